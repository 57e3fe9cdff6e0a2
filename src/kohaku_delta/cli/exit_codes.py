"""The exit codes of commands that compare or check."""

import click

from kohaku_delta.cli.stage_command import StageCommand
from kohaku_delta.errors import Interrupted, UserError

EQUAL, DIFFERENT, CANNOT_COMPARE = 0, 1, 2
UNFORESEEN = "an error that this program does not foresee"


class CannotCompare(UserError):
    exit_code = CANNOT_COMPARE


class ComparisonCommand(StageCommand):
    """A command whose errors exit with CANNOT_COMPARE, because 1 is one of its results. Readers refuse what they cannot
    read; an error that none of them foresaw is no result either.
    """

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except Interrupted:
            raise
        except UserError as error:
            raise CannotCompare(*error.lines) from None
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            raise CannotCompare(
                f"It cannot be judged: {UNFORESEEN} ({type(error).__name__}: {error}). Please report it."
            ) from error
