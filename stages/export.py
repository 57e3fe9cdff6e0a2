"""export: the final model as diffusers reads it. Reads the baked checkpoint and the tokenizers (inputs.json); writes
the folder diffusers/.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import numerics, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.hub import inputs_manifest as listed
from kohaku_delta.printing import print_line
from kohaku_delta.sdxl import checkpoint_checks


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs.")
@click.option("--model", type=FILE, default=paths.FINAL, help="The checkpoint.")
@click.option("--tokenizer", type=FILE, help="Folder with vocab.json and merges.txt.  [default: tokenizer of --inputs]")
@click.option("--tokenizer-2", type=FILE, help="For the second text encoder.  [default: tokenizer_2 of --inputs]")
@click.option("--out", type=FILE, default=paths.DIFFUSERS, help="The folder.")
@click.option(
    "--drop-extra", is_flag=True, help="Leave out tensors outside U-Net, VAE and text encoders, and list them."
)
def main(
    params: Path,
    inputs: Path,
    model: Path,
    tokenizer: Path | None,
    tokenizer_2: Path | None,
    out: Path,
    drop_extra: bool,
) -> None:
    """Write the folder that StableDiffusionXLPipeline.from_pretrained loads."""
    recipe = recipes.load(params).model
    tokenizers = {
        "tokenizer": listed.tokenizer(inputs, "tokenizer", tokenizer),
        "tokenizer_2": listed.tokenizer(inputs, "tokenizer_2", tokenizer_2),
    }
    numerics.prepare()
    from kohaku_delta.weights import export_diffusers  # imports torch, after the numerics are set

    exported = export_diffusers.export(model, tokenizers, recipe, out, drop_extra)
    if exported.left_out:
        print_line(f"export: left out {checkpoint_checks.list_names(exported.left_out)}", err=True)
    print_summary(
        "export", f"{exported.bytes:,} bytes of tensors, vae scaling factor {recipe.vae_scaling_factor} → {out}"
    )


if __name__ == "__main__":
    main()
