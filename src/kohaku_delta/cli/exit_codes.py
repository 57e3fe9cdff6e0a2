"""The exit codes of commands that compare or check."""

import click

from kohaku_delta.cli.stage_command import StageCommand
from kohaku_delta.errors import Interrupted, UserError

EQUAL, DIFFERENT, CANNOT_COMPARE = 0, 1, 2


class CannotCompare(UserError):
    exit_code = CANNOT_COMPARE


class ComparisonCommand(StageCommand):
    """A command whose errors exit with CANNOT_COMPARE, because 1 is one of its results."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except Interrupted:
            raise
        except UserError as error:
            raise CannotCompare(error.message) from None
