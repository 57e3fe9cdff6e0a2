"""kohaku-delta pin: what the pins of a recipe leave open, filled from the hub's own list of files."""

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand
from kohaku_delta.hub import fill_pins

SHOWN = 30  # lines of a diff


@click.command(cls=StageCommand)
@click.option(
    "--params",
    type=click.Path(path_type=Path),
    default="params.yaml",
    show_default=True,
    help="The recipe whose pins are filled.",
)
@click.option("--yes", is_flag=True, help="Write without asking.")
def pin(params: Path, yes: bool) -> None:
    """Fill what the pins of params.yaml leave open: revision, bytes, sha256.

    The hub's list of files at the pinned revision is asked; nothing is downloaded. The change is shown before it is
    written.
    """
    edit = fill_pins.fill_pins(params, recipes.load(params))
    for path, content in reversed(edit.files.items()):
        lines = fill_pins.unified_diff(path, content)
        click.echo(
            "\n".join(lines[:SHOWN] + ([f"… and {len(lines) - SHOWN:,} more lines"] if len(lines) > SHOWN else []))
        )
    for remark in edit.remarks:
        click.echo(remark)
    if not edit.files:
        click.echo(f"{params}: no pin of a file on the hub leaves anything open")
    elif yes or click.confirm("Write this?"):
        for path, content in edit.files.items():  # the lists first: params.yaml names their digests
            with atomic_files.atomic_write(path) as file:
                file.write(content)
            click.echo(f"written: {path}")
    else:
        click.echo("nothing was written")
        raise SystemExit(1)
