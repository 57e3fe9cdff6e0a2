"""merge: the delta base. Reads the two parents and the SDXL donor (inputs.json), or the published base; writes
delta-base.safetensors.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand, print_summary
from kohaku_delta.hub import inputs_manifest as listed
from kohaku_delta.weights import merge


@click.command(cls=StageCommand)
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    default="build/inputs.json",
    show_default=True,
    help="The list of verified inputs.",
)
@click.option(
    "--sdxl", type=click.Path(path_type=Path), help="The donor of the original embeddings.  [default: sdxl of --inputs]"
)
@click.option("--gamma", type=click.Path(path_type=Path), help="A parent.  [default: gamma of --inputs]")
@click.option("--beta", type=click.Path(path_type=Path), help="The other parent.  [default: beta of --inputs]")
@click.option(
    "--published",
    "delta_base",
    type=click.Path(path_type=Path),
    help="The base to take as it is, with merge.start: published.  [default: delta_base of --inputs]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="build/delta-base.safetensors",
    show_default=True,
    help="The delta base.",
)
def main(
    params: Path,
    inputs: Path,
    sdxl: Path | None,
    gamma: Path | None,
    beta: Path | None,
    delta_base: Path | None,
    out: Path,
) -> None:
    """Give both parents the donor's embeddings back and add them up."""
    recipe = recipes.load(params).merge
    if recipe.start == "published":
        written = merge.copy_published_base(
            delta_base or listed.path(inputs, "delta_base"),
            None if delta_base else listed.sha256(inputs, "delta_base"),
            out,
        )
    else:
        parents = {"gamma": gamma or listed.path(inputs, "gamma"), "beta": beta or listed.path(inputs, "beta")}
        written = merge.merge(sdxl or listed.path(inputs, "sdxl"), parents, recipe, out)
    print_summary(
        "merge", f"{written.bytes:,} bytes, sha256 {written.sha256[:16]}…, contents {written.digest[:16]}… → {out}"
    )


if __name__ == "__main__":
    main()
