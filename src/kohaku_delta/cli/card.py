"""kohaku-delta card: the model card of a build, with Hugging Face's front matter."""

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.printing import print_line
from kohaku_delta.report import build_summary, model_card


@click.command(cls=StageCommand)
@click.argument("folder", type=FILE, default=".")
@click.option(
    "--out", type=FILE, help="The card.  [default: build/README.md of FOLDER, the name that Hugging Face reads]"
)
def card(folder: Path, out: Path | None) -> None:
    """Write the model card of a build. FOLDER is the recipe's folder, with params.yaml and dvc.lock."""
    build = build_summary.read_build(folder)
    out = out or build.folder / "README.md"
    text = model_card.render_card(build)
    with atomic_files.atomic_write(out, "w") as file:
        file.write(text)
    print_line(f"{out}: the card of {build.recipe.bake.title}")
