"""bake: the final model. Reads the delta base and its LoKr; writes kohaku-xl-delta.safetensors."""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta import paths
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.printing import print_line
from kohaku_delta.sdxl import checkpoint_checks
from kohaku_delta.weights import bake


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--base", type=FILE, default=paths.BASE, help="The trained base.")
@click.option("--lokr", type=FILE, default=paths.LOKR, help="The trained LoKr.")
@click.option("--out", type=FILE, default=paths.FINAL, help="The result.")
@click.option("--force", is_flag=True, help="Accept another base, and leave out entries that match no tensor.")
@click.option("--drop-extra", is_flag=True, help="Leave out embeddings that are bundled with the LoKr, and list them.")
def main(params: Path, base: Path, lokr: Path, out: Path, force: bool, drop_extra: bool) -> None:
    """Add the trained differences to the base."""
    recipe = recipes.load(params)
    baked = bake.bake(base, lokr, recipe.bake, recipe.model.side, out, force, drop_extra)
    if baked.embeddings:
        print_line(f"bake: left out {checkpoint_checks.list_names(baked.embeddings)}", err=True)
    for module in baked.left_out:
        print_line(f"bake: left out {module}, which matches no tensor", err=True)
    print_summary(
        "bake",
        f"{baked.tensors:,} tensors changed, {baked.written.bytes:,} bytes, sha256 {baked.written.sha256} → {out}",
    )


if __name__ == "__main__":
    main()
