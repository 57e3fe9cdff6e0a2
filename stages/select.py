"""select: draws the posts to train on. Reads the database (inputs.json); writes selection.parquet (post_id, drawn)."""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click
import pyarrow.compute as pc

from kohaku_delta import params as recipes
from kohaku_delta import paths
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.danbooru import schema
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import selection
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest as listed
from kohaku_delta.printing import print_line


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs.")
@click.option("--database", type=FILE, help="danbooru2023.db.  [default: the database of --inputs]")
@click.option("--out", type=FILE, default=paths.SELECTION, help="The selected posts.")
def main(params: Path, inputs: Path, database: Path | None, out: Path) -> None:
    """Draw the posts to train on."""
    recipe = recipes.load(params)
    source = Database(database or listed.path(inputs, "database"))
    for warning in schema.check_schema(source):
        print_line(f"select: {warning}", err=True)
    selected = selection.select(source, recipe.selection)
    parquet.write(selected, out)
    drawn = pc.sum(selected["drawn"]).as_py()
    print_summary("select", f"{selected.num_rows:,} distinct posts, drawn {drawn:,} times → {out}")


if __name__ == "__main__":
    main()
