"""kohaku-delta: the commands beside the pipeline. `make repro` installs it in .venv/bin.

One module per command in this folder; it is imported when the command is run.
"""

import importlib

import click

from kohaku_delta.cli.version_option import version_option
from kohaku_delta.errors import Interrupted

COMMANDS = [
    "audit",
    "bundle",
    "card",
    "compare",
    "operators",
    "pilot-report",
    "pin",
    "preflight",
    "provenance",
    "release",
    "replay",
    "report",
    "set-aside",
    "stage",
    "tensors",
    "upload",
    "watch",
]


class CommandGroup(click.Group):
    """Imports a command's module on demand: the whole set takes a second, and DVC starts `stage` for every stage."""

    def list_commands(self, context) -> list[str]:
        return COMMANDS

    def get_command(self, context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = name.replace("-", "_")
        return getattr(importlib.import_module(f"kohaku_delta.cli.{module}"), module)

    def invoke(self, context: click.Context):
        """Turns Ctrl-C into one sentence."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise Interrupted from None


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Check, compare and publish checkpoints, LoKr files, trainings, hosts and recipe folders."""


version_option(main)
