"""preview: what the training changed. Reads base and final, selection, inputs; writes preview.png (a labelled grid) and
held-out.json (losses, distances).
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand, print_summary

FILE = click.Path(path_type=Path)


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--inputs",
    type=FILE,
    default="build/inputs.json",
    show_default=True,
    help="The verified inputs (tokenizers, database, tars).",
)
@click.option("--database", type=FILE, help="danbooru2023.db.  [default: that of --inputs]")
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: that of --inputs]")
@click.option(
    "--tokenizer", type=FILE, help="Folder with vocab.json and merges.txt.  [default: the tokenizer of --inputs]"
)
@click.option(
    "--tokenizer-2", type=FILE, help="The same for the second text encoder.  [default: the tokenizer_2 of --inputs]"
)
@click.option(
    "--references",
    type=FILE,
    help="Folder with a drawing per prompt, in the prompts' order (*.png).  [default: those of --inputs, if it has any]",
)
@click.option(
    "--selection",
    type=FILE,
    default="build/selection.parquet",
    show_default=True,
    help="What was drawn: held-out posts are none of these.",
)
@click.option("--base", type=FILE, default="build/delta-base.safetensors", show_default=True)
@click.option(
    "--model", type=FILE, default="build/kohaku-xl-delta.safetensors", show_default=True, help="The baked checkpoint."
)
@click.option("--out", type=FILE, default="build/preview.png", show_default=True)
@click.option("--held-out", type=FILE, default="build/held-out.json", show_default=True)
def main(params: Path, **files) -> None:
    """Draw base beside final, and measure both on posts that were not selected."""
    recipe = recipes.load(params)
    numerics.enforce(recipe.train.device)
    from kohaku_delta.preview import base_and_final

    losses = base_and_final.compare_base_and_final(recipe, files)
    distance = (
        f", distance {losses['base']['distance']['mean']:.1f} → {losses['final']['distance']['mean']:.1f}"
        if "flat" in losses
        else ""
    )
    measured = f"no held-out loss ({losses.get('reason')})"
    if losses["posts"]:
        measured = f"held-out loss {losses['base']['loss']['sdxl']:.4f} → {losses['final']['loss']['sdxl']:.4f} on {losses['posts']} posts"
    print_summary("preview", f"{measured}{distance} → {files['out']}, {files['held_out']}")


if __name__ == "__main__":
    main()
