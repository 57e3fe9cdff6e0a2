"""kohaku-delta card: the model card of a build, with Hugging Face's front matter, from what its lock and its outs say."""

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta.cli.stage_command import StageCommand


@click.command(cls=StageCommand)
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The card.  [default: build/README.md of FOLDER, the name that Hugging Face reads]",
)
def card(folder: Path, out: Path | None) -> None:
    """Write the model card of a build. FOLDER is the recipe's, the one with params.yaml and dvc.lock."""
    from kohaku_delta.report import (
        build_summary as builds,
    )  # here, so that the other commands need not wait for what a card is made with
    from kohaku_delta.report import model_card as cards

    build = builds.read_build(folder)
    out = out or build.folder / "README.md"
    text = cards.render_card(build)
    with atomic_files.atomic_write(out, "w") as file:
        file.write(text)
    click.echo(f"{out}: the card of {build.recipe.bake.title}")
