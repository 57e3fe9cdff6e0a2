"""Invariant: what a user did wrong reaches them as sentences and exit code 1, never as a traceback."""

import click


class Refusal(click.ClickException):
    """Bad input. The message says what was wrong, where (file, key) and what to do."""
