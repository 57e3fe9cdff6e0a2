"""preview: what the training changed. Reads base and final, selection, inputs; writes preview.png (a labelled grid),
samples/ (its pictures, one by one) and held-out.json (losses, distances).
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
    "--references",
    type=FILE,
    help="Folder with one drawing per prompt, in the prompts' order (*.png).  [default: those of --inputs, if any]",
)
@click.option(
    "--selection", type=FILE, default=paths.SELECTION, help="The selected posts: held-out posts are none of these."
)
@click.option("--base", type=FILE, default=paths.BASE)
@click.option("--model", type=FILE, default=paths.FINAL, help="The baked checkpoint.")
@click.option("--out", type=FILE, default=paths.PREVIEW)
@click.option("--samples", type=FILE, default=paths.SAMPLES, help="The folder of the pictures.")
@click.option("--held-out", type=FILE, default=paths.HELD_OUT)
def main(params: Path, **files) -> None:
    """Draw base beside final, and measure both on posts that were not selected."""
    recipe = recipes.load(params)
    numerics.enforce(recipe.train.device)
    from kohaku_delta.preview import base_and_final

    measured = base_and_final.compare_base_and_final(recipe, files)
    base, final = measured.get("base", {}), measured.get("final", {})
    summary = f"no held-out loss ({measured.get('reason')})"
    if measured["posts"]:
        losses = f"{base['loss']['sdxl']:.4f} → {final['loss']['sdxl']:.4f}"
        summary = f"held-out loss {losses} on {measured['posts']} posts"
    if "flat" in measured:
        summary += f", distance {base['distance']['mean']:.1f} → {final['distance']['mean']:.1f}"
    print_summary("preview", f"{summary} → {files['out']}, {files['samples']}, {files['held_out']}")


if __name__ == "__main__":
    main()
