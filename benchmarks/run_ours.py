"""One merge or bake as the stage does it, with any piece size and number of threads. The last line is the sha256.

Run by benchmarks/checkpoint.py: `python benchmarks/run_ours.py merge FOLDER OUT --numbers 16384 --threads 1`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")

import click

from kohaku_delta import params
from kohaku_delta.parallel import THREADS
from kohaku_delta.weights import bake, merge

RECIPE = Path(__file__).resolve().parents[1] / "params.yaml"


@click.command()
@click.argument("what", type=click.Choice(["merge", "bake"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--numbers", default=merge.NUMBERS, show_default=True, help="Of a tensor, computed at a time.")
@click.option("--threads", default=2 * THREADS, show_default=True)
def main(what: str, folder: Path, out: Path, numbers: int, threads: int) -> None:
    """Merge gamma and beta, or bake lokr into gamma."""
    recipe, files = (
        params.load(RECIPE),
        {name: folder / f"{name}.safetensors" for name in ("sdxl", "gamma", "beta", "lokr")},
    )
    if what == "merge":
        written = merge.merge(
            files["sdxl"], {name: files[name] for name in ("gamma", "beta")}, recipe.merge, out, threads, numbers
        ).written
    else:
        written = bake.bake(
            files["gamma"], files["lokr"], recipe.bake, recipe.model.side, out, threads=threads, numbers=numbers
        ).written
    click.echo(written.sha256)


if __name__ == "__main__":
    main()
