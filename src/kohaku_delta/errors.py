"""Invariant: what a user did wrong reaches them as sentences and exit code 1, never as a traceback."""

import click


class UserError(click.ClickException):
    """Bad input. The message says what was wrong, where (file, key) and what to do."""


class Interrupted(UserError):
    """Ctrl-C. The exit code is the shell's: 128 + SIGINT."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("Interrupted. Nothing unfinished was left behind; run the same command to go on.")


def version_option(command: click.Command) -> None:
    """Give a command the option --version: that of the installed package, which is no code of a stage."""
    click.version_option(package_name="kohaku-delta", prog_name="kohaku-delta", message="%(prog)s %(version)s")(command)
