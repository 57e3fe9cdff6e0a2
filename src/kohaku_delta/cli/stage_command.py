"""The base class of the stages and of most commands: errors become one sentence, and files are sandboxed."""

import errno
import os
import select
from pathlib import Path

import click

from kohaku_delta import sandbox
from kohaku_delta.cli.version_option import version_option
from kohaku_delta.errors import Interrupted, UserError
from kohaku_delta.hub import dvc_checkout
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import stage_record

REMEDIES = {
    errno.ENOSPC: "Free some space and run the stage again.",
    errno.EACCES: "Check the permissions, or give another path by the option. "
    "A stage may open only what it declares (docs/sandbox.md).",
    errno.EROFS: "The file system is read-only: give another path by the option.",
    errno.ENOTDIR: "Check the path: a part of it is a file, not a folder.",
    errno.EISDIR: "Check the path: a file was expected there.",
    errno.ELOOP: "Check the path: its links lead back to themselves.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ENOENT: "Check the path, or run the stage that writes it.",
}
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}
NOBODY_READS = 141  # the shell's: 128 + SIGPIPE
FILE = click.Path(path_type=Path)  # of options that name a file or a folder


class StageCommand(click.Command):
    """A click command that is confined to the files it declares, and reports errors of the operating system."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **{"context_settings": CONTEXT, **settings})
        version_option(self)

    def invoke(self, context: click.Context):
        try:
            if context.params.get("params"):
                dvc_checkout.link_inputs(context.params["params"], with_work="work" in context.params)
            with stage_record.recorded(context), sandbox.confined(self, context):
                return super().invoke(context)
        except OSError as error:
            _end_if_nobody_reads(error)
            path = f" at {error.filename}" if error.filename else ""
            remedy = REMEDIES.get(
                error.errno or 0, "No partial output was left; run the stage again when the cause is fixed."
            )
            raise UserError(f"The operating system said “{error.strerror or error}”{path}. {remedy}") from None
        except KeyboardInterrupt:
            raise Interrupted from None
        except MemoryError:
            raise UserError("There was not enough memory. No partial output was left.") from None


def _end_if_nobody_reads(error: OSError) -> None:
    """Ends the process without a word if its standard output is a pipe whose reader is gone (`| head`)."""
    if error.errno != errno.EPIPE:
        return
    standard_output = select.poll()
    standard_output.register(1, select.POLLOUT)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in standard_output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(NOBODY_READS) from None


def print_summary(stage: str, line: str) -> None:
    """The one line that a stage ends with."""
    print_line(f"{stage}: {line}")


def format_counts(counts: dict[str, int]) -> str:
    """Counts as a phrase: "12 deleted, 3 banned", or "none"."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
