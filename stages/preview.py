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


def file_option(name: str, default: str | None = None, help: str | None = None):
    return click.option(name, type=click.Path(path_type=Path), default=default, show_default=bool(default), help=help)


@click.command(cls=StageCommand)
@file_option("--params", "params.yaml", "The recipe.")
@file_option("--inputs", "build/inputs.json", "The verified inputs (tokenizers, database, tars).")
@file_option("--database", help="danbooru2023.db.  [default: that of --inputs]")
@file_option("--tars", help="The folder of the tars.  [default: that of --inputs]")
@file_option("--tokenizer", help="Folder with vocab.json and merges.txt.  [default: the tokenizer of --inputs]")
@file_option("--tokenizer-2", help="The same for text encoder 2.  [default: the tokenizer_2 of --inputs]")
@file_option(
    "--references",
    help="Folder with one drawing per prompt, in the prompts' order (*.png).  [default: those of --inputs, if any]",
)
@file_option("--selection", "build/selection.parquet", "The selected posts: held-out posts are none of these.")
@file_option("--base", "build/delta-base.safetensors")
@file_option("--model", "build/kohaku-xl-delta.safetensors", "The baked checkpoint.")
@file_option("--out", "build/preview.png")
@file_option("--held-out", "build/held-out.json")
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
    print_summary("preview", f"{summary} → {files['out']}, {files['held_out']}")


if __name__ == "__main__":
    main()
