"""download: fetches and verifies every pinned input (params.yaml: download.inputs). Writes inputs.json; the files stay in the mirror."""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.hub import inputs, mirror
from kohaku_delta.stage import Stage, summary


@click.command(cls=Stage)
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True, help="The recipe.")
@click.option("--mirror", "folder", type=click.Path(path_type=Path), help="Where downloaded files are kept.  [default: download.mirror]")
@click.option("--out", type=click.Path(path_type=Path), default="build/inputs.json", show_default=True, help="The list of verified inputs.")
def main(params: Path, folder: Path | None, out: Path) -> None:
    """Fetch and verify every pinned input."""
    recipe = recipes.load(params)
    download = recipe.download.model_copy(update={"mirror": str(folder.resolve())}) if folder else recipe.download
    unused = {"delta_base"} if recipe.merge.start == "merge" else {"gamma", "beta"}
    entries = mirror.gather(download, params.parent, unused)
    inputs.write(entries, out)
    files = [each for entry in entries.values() for each in (entry if isinstance(entry, list) else [entry])]
    summary("download", f"{len(files)} inputs, {sum(each['bytes'] for each in files):,} bytes, every sha256 verified → {out}")


if __name__ == "__main__":
    main()
