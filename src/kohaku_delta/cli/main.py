"""kohaku-delta: what a person asks of files, beside the pipeline; `make repro` installs it in .venv/bin. A file a
command in commands/.
"""

import click

from kohaku_delta.cli.audit import command as audit
from kohaku_delta.cli.bundle import command as bundle
from kohaku_delta.cli.card import card
from kohaku_delta.cli.compare import command as compare
from kohaku_delta.cli.operators import operators
from kohaku_delta.cli.pin import pin
from kohaku_delta.cli.preflight import preflight
from kohaku_delta.cli.provenance import command as provenance
from kohaku_delta.cli.replay import replay
from kohaku_delta.cli.report import report
from kohaku_delta.cli.stage import stage
from kohaku_delta.cli.tensors import tensors
from kohaku_delta.errors import Interrupted, version_option


class CommandGroup(click.Group):
    """The subcommands; Ctrl-C is one sentence in each."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise Interrupted from None


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Ask about checkpoints, LoKr files, trainings, hosts and folders of the recipe."""


for command in (audit, bundle, card, compare, operators, pin, preflight, provenance, replay, report, stage, tensors):
    main.add_command(command)
version_option(main)
version_option(operators)  # the others are stages, which have it, or hand their options on
