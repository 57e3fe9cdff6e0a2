"""merge: the base that is trained on. Reads the two parents and the SDXL donor, or the published base (inputs.json);
writes delta-base.safetensors.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta import paths
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.hub import inputs_manifest as listed
from kohaku_delta.printing import print_line
from kohaku_delta.weights import merge


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs.")
@click.option("--sdxl", type=FILE, help="The donor of the original embeddings.  [default: sdxl of --inputs]")
@click.option("--gamma", type=FILE, help="A parent.  [default: gamma of --inputs]")
@click.option("--beta", type=FILE, help="The other parent.  [default: beta of --inputs]")
@click.option(
    "--published",
    "delta_base",
    type=FILE,
    help="With merge.start: published, the base to copy.  [default: delta_base of --inputs]",
)
@click.option("--out", type=FILE, default=paths.BASE, help="The delta base.")
def main(
    params: Path,
    inputs: Path,
    sdxl: Path | None,
    gamma: Path | None,
    beta: Path | None,
    delta_base: Path | None,
    out: Path,
) -> None:
    """Give both parents the donor's embeddings and add them up, or copy the published base."""
    recipe = recipes.load(params).merge
    if recipe.start == "published":
        merged = merge.copy_published_base(
            delta_base or listed.path(inputs, "delta_base"),
            None if delta_base else listed.sha256(inputs, "delta_base"),
            out,
            recipe.extra_tensors == "drop",
        )
    else:
        parents = {"gamma": gamma or listed.path(inputs, "gamma"), "beta": beta or listed.path(inputs, "beta")}
        merged = merge.merge(sdxl or listed.path(inputs, "sdxl"), parents, recipe, out)
    for note in merged.notes:
        print_line(f"merge: {note}", err=True)
    written = merged.written
    print_summary(
        "merge", f"{written.bytes:,} bytes, sha256 {written.sha256[:16]}…, contents {written.digest[:16]}… → {out}"
    )


if __name__ == "__main__":
    main()
