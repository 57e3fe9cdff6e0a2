"""download: downloads and verifies every pinned input (params.yaml: download.inputs). Writes inputs.json; the files
stay in the mirror.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta import paths
from kohaku_delta.cli.stage_command import FILE, StageCommand, format_counts, print_summary
from kohaku_delta.dataset import fetch_inputs
from kohaku_delta.hub import inputs_manifest


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option(
    "--mirror",
    "other_mirrors",
    type=FILE,
    multiple=True,
    help="Another mirror, only read: files are looked for there before they are downloaded. May be repeated.",
)
@click.option("--out", type=FILE, default=paths.INPUTS, help="The list of verified inputs.")
def main(params: Path, other_mirrors: tuple[Path, ...], out: Path) -> None:
    """Download and verify every pinned input."""
    recipe = recipes.load(params)
    entries = fetch_inputs.fetch_inputs(recipe, params.parent, other_mirrors)
    inputs_manifest.write(entries, params.parent, recipe.merge.start, out)
    files = [file for entry in entries.values() for file in (entry if isinstance(entry, list) else [entry])]
    size, counts = sum(file["bytes"] for file in files), format_counts(inputs_manifest.pin_counts(files))
    print_summary("download", f"{len(files):,} files, {size:,} bytes, all hashed ({counts}) → {out}")


if __name__ == "__main__":
    main()
