"""filter: which of the selected posts have an image and a caption. Reads selection, database and tars; writes
posts.parquet, dropped.parquet.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand, print_summary
from kohaku_delta.danbooru import tars as archives
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import filtering
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest as listed


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
    "--database", type=click.Path(path_type=Path), help="danbooru2023.db.  [default: the database of --inputs]"
)
@click.option(
    "--tars", type=click.Path(path_type=Path), help="The folder of data-0000.tar ….  [default: the tars of --inputs]"
)
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    help="Where the index of the tars is kept.  [default: beside their folder, *.members.parquet]",
)
@click.option(
    "--partial", is_flag=True, help="Take what the tars at hand hold: posts of other tars are dropped as missing."
)
@click.option(
    "--selection",
    type=click.Path(path_type=Path),
    default="build/selection.parquet",
    show_default=True,
    help="The posts to look at.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="build/posts.parquet",
    show_default=True,
    help="What is trained on.",
)
@click.option(
    "--dropped",
    type=click.Path(path_type=Path),
    default="build/dropped.parquet",
    show_default=True,
    help="What is not, and why.",
)
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
    files = archives.tars_in(tars) if tars else archives.tars_by_number(listed.paths(inputs, "tars"))
    if not tars:
        listed.optional_paths(inputs, "index")  # compared too: the index beside a tar says what its members are
    source = Database(database or listed.path(inputs, "database"))
    trained, lost = filtering.filter_posts(source, files, ids, recipe.filter, recipe.caption, index, partial)
    parquet.write(trained, out)
    parquet.write(lost, dropped)
    print_summary(
        "filter",
        f"{len(ids):,} selected = {trained.num_rows:,} trained + {lost.num_rows:,} dropped ({filtering.format_counts(trained, lost)}) → {out}, {dropped}",
    )


if __name__ == "__main__":
    main()
