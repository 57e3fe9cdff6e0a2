"""kohaku-delta card: the model card of a build, with Hugging Face's front matter, from what its lock and its outs say."""

from pathlib import Path

import click

from kohaku_delta import atomic
from kohaku_delta.stage import Stage


@click.command(cls=Stage)
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option("--out", type=click.Path(path_type=Path), help="The card.  [default: build/README.md of FOLDER, the name that Hugging Face reads]")
def card(folder: Path, out: Path | None) -> None:
    """Write the model card of a build. FOLDER is the recipe's, the one with params.yaml and dvc.lock."""
    from kohaku_delta.report import build as builds  # here, so that the other commands need not wait for what a card is made with
    from kohaku_delta.report import card as cards

    build = builds.read(folder)
    out = out or build.folder / "README.md"
    text = cards.text(build)
    with atomic.writing(out, "w") as file:
        file.write(text)
    click.echo(f"{out}: the card of {build.recipe.bake.title}")
