"""Invariant: what a user did wrong reaches them as sentences and exit code 1, never as a traceback."""

import click

from kohaku_delta import __version__


class Refusal(click.ClickException):
    """Bad input. The message says what was wrong, where (file, key) and what to do."""


class Interrupted(Refusal):
    """Ctrl-C. The exit code is the shell's: 128 + SIGINT."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("Interrupted. Nothing unfinished was left behind; run the same command to go on.")


def version_option(command: click.Command) -> None:
    """Give a command the option --version."""
    click.version_option(__version__, prog_name="kohaku-delta", message="%(prog)s %(version)s")(command)
