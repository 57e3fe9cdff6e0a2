"""The option --version of every command. It imports only click, so `kohaku-delta --version` is quick."""

import click


def version_option(command: click.Command) -> None:
    """Give a command the option --version, which prints the version of the installed package."""
    click.version_option(package_name="kohaku-delta", prog_name="kohaku-delta", message="%(prog)s %(version)s")(command)
