"""Errors that a user sees: sentences and an exit code, never a traceback."""

from collections.abc import Sequence

import click

from kohaku_delta.printing import printable


class UserError(click.ClickException):
    """Bad input; exit code 1. The message says what is wrong, where (file, key) and what to do.

    Each argument is a line. What it quotes of a file is escaped here, so a name with a line end or an escape sequence
    stays text wherever the message is printed.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = [printable(line) for line in lines]
        super().__init__("\n".join(self.lines))


class Interrupted(UserError):
    """Ctrl-C. The exit code is the shell's: 128 + SIGINT."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("Interrupted. Nothing unfinished was left behind; run the same command to go on.")


def first_lines(lines: Sequence[str], limit: int = 20) -> list[str]:
    """The first lines of a list, indented to stand under a message, and how many more there are."""
    rest = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return [f"  {line}" for line in [*lines[:limit], *rest]]
