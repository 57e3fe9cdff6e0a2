"""bake: the final model. Reads the delta base and the LoKr trained on it; writes kohaku-xl-delta.safetensors."""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand, print_summary
from kohaku_delta.weights import bake


@click.command(cls=StageCommand)
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    default="build/delta-base.safetensors",
    show_default=True,
    help="The checkpoint that was trained on.",
)
@click.option(
    "--lokr",
    type=click.Path(path_type=Path),
    default="build/delta-lokr.safetensors",
    show_default=True,
    help="What was trained.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="build/kohaku-xl-delta.safetensors",
    show_default=True,
    help="The baked checkpoint.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Bake onto another base than the LoKr names, and leave out entries that match no tensor.",
)
def main(params: Path, base: Path, lokr: Path, out: Path, force: bool) -> None:
    """Add what was trained to the base."""
    baked = bake.bake(base, lokr, recipes.load(params).bake, out, force)
    for module in baked.left_out:
        click.echo(f"bake: left out {module}, which matches no tensor", err=True)
    print_summary(
        "bake",
        f"{baked.tensors:,} tensors changed, {baked.written.bytes:,} bytes, sha256 {baked.written.sha256} → {out}",
    )


if __name__ == "__main__":
    main()
