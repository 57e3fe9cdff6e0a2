"""Invariant: a command that judges ends with 0 (equal), 1 (different) or 2 (it cannot be judged)."""

import click

from kohaku_delta.cli.stage_command import StageCommand
from kohaku_delta.errors import UserError


class ComparisonCommand(StageCommand):
    """A command whose refusals end with 2, because 1 is its judgement."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except UserError as refusal:
            refusal.exit_code = 2
            raise
