"""filter: keeps the selected posts that have an image and a caption. Reads selection, database and tars; writes
posts.parquet and dropped.parquet.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta import paths
from kohaku_delta.cli.stage_command import FILE, StageCommand, format_counts, print_summary
from kohaku_delta.danbooru.database import Database
from kohaku_delta.danbooru.tars import tars_by_number, tars_in
from kohaku_delta.dataset import filtering
from kohaku_delta.dataset.post_metadata import reason_counts
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest as listed


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs.")
@click.option("--database", type=FILE, help="danbooru2023.db.  [default: the database of --inputs]")
@click.option("--tars", type=FILE, help="The folder of data-0000.tar ….  [default: the tars of --inputs]")
@click.option(
    "--index", type=FILE, help="Where the index of the tars is kept.  [default: beside their folder, *.members.parquet]"
)
@click.option(
    "--partial", is_flag=True, help="Use only the tars that are there: posts of other tars are dropped as missing."
)
@click.option("--selection", type=FILE, default=paths.SELECTION, help="Selected posts.")
@click.option("--out", type=FILE, default=paths.POSTS, help="The posts to train on.")
@click.option("--dropped", type=FILE, default=paths.DROPPED, help="The others, and why.")
def main(
    params: Path,
    inputs: Path,
    database: Path | None,
    tars: Path | None,
    index: Path | None,
    partial: bool,
    selection: Path,
    out: Path,
    dropped: Path,
) -> None:
    """Keep the posts that have an image and a caption."""
    recipe = recipes.load(params)
    ids = parquet.read(selection, ["post_id"])["post_id"].to_numpy()
    files = tars_in(tars) if tars else tars_by_number(listed.paths(inputs, "tars"))
    if not tars:
        listed.optional_paths(inputs, "index")  # verified too: the index beside a tar decides its members
    source = Database(database or listed.path(inputs, "database"))
    trained, lost = filtering.filter_posts(source, files, ids, recipe.filter, recipe.caption, index, partial)
    parquet.write(trained, out, filtering.decoding(recipe.filter).metadata)
    parquet.write(lost, dropped)
    reasons, despite = (format_counts(reason_counts(c)) for c in (lost["reason"], trained["despite"]))
    print_summary(
        "filter",
        f"{len(ids):,} selected = {trained.num_rows:,} trained + {lost.num_rows:,} dropped "
        f"({reasons}; trained despite the metadata: {despite}) → {out}, {dropped}",
    )


if __name__ == "__main__":
    main()
