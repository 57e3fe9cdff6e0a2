"""Invariant: every stage ends with one summary line and exit code 0, or with one sentence and another exit code; it
opens what it declares.
"""

import errno

import click

from kohaku_delta import sandbox as hermetic
from kohaku_delta.errors import Interrupted, UserError, version_option
from kohaku_delta.hub import dvc_checkout
from kohaku_delta.provenance import stage_record


CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


class StageCommand(click.Command):
    """A click command that is held to what it declares, and turns what the operating system refuses into a sentence."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **{"context_settings": CONTEXT, **settings})
        version_option(self)

    def invoke(self, context: click.Context):
        try:
            if context.params.get("params"):
                dvc_checkout.link_inputs(context.params["params"])
            with stage_record.recorded(context), hermetic.confined(self, context):
                return super().invoke(context)
        except OSError as error:
            place = f" at {error.filename}" if error.filename else ""
            remedy = {
                errno.ENOSPC: "Free some space and run the stage again.",
                errno.EACCES: "Check the permissions, or name another place by the option. What a stage does not declare is closed to it (docs/hermetic.md).",
                errno.EROFS: "The file system is read-only: name another place by the option.",
                errno.ENOENT: "Check the path, or run the stage that writes it.",
            }.get(error.errno, "Nothing unfinished was left behind; run the stage again when this is mended.")
            raise UserError(f"The operating system said “{error.strerror or error}”{place}. {remedy}") from None
        except KeyboardInterrupt:
            raise Interrupted from None
        except MemoryError:
            raise UserError("There was not enough memory. Nothing unfinished was left behind.") from None


def print_summary(stage: str, line: str) -> None:
    """The one line that a stage ends with."""
    click.echo(f"{stage}: {line}")
