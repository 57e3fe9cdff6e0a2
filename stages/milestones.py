"""milestones: how the training got there. Reads base, LoKr, milestones, selection, inputs; writes milestones.csv
(held-out loss by step) and milestones.png (prompts × steps).
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import numerics, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs (tokenizers, database, tars).")
@click.option("--database", type=FILE, help="danbooru2023.db.  [default: that of --inputs]")
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: that of --inputs]")
@click.option(
    "--tokenizer", type=FILE, help="Folder with vocab.json and merges.txt.  [default: the tokenizer of --inputs]"
)
@click.option("--tokenizer-2", type=FILE, help="The same for text encoder 2.  [default: the tokenizer_2 of --inputs]")
@click.option(
    "--selection", type=FILE, default=paths.SELECTION, help="The selected posts: held-out posts are none of these."
)
@click.option("--base", type=FILE, default=paths.BASE, help="The trained base.")
@click.option("--milestones", type=FILE, default=paths.MILESTONES, help="The folder of the milestones' LoKr files.")
@click.option("--lokr", type=FILE, default=paths.LOKR, help="The final LoKr.")
@click.option("--out", type=FILE, default=paths.MILESTONES_CSV, help="Held-out loss by step.")
@click.option("--grid", type=FILE, default=paths.MILESTONES_PNG, help="The pictures.")
def main(params: Path, **files) -> None:
    """Measure base, milestones and final model on posts that were not selected, and draw the preview's prompts."""
    recipe = recipes.load(params)
    numerics.enforce(recipe.train.device)
    from kohaku_delta.preview import milestones

    measured = milestones.measure_milestones(recipe, files)
    steps, losses = list(measured), [each.losses["sdxl"] for each in measured.values() if each.losses]
    summary = f"held-out loss {' → '.join(f'{loss:.4f}' for loss in losses)}" if losses else "no held-out loss"
    print_summary(
        "milestones",
        f"{summary} after {', '.join(f'{step:,}' for step in steps)} steps → {files['out']}, {files['grid']}",
    )


if __name__ == "__main__":
    main()
