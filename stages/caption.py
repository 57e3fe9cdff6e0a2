"""caption: writes the caption of each image. Reads posts and the database; writes captions.parquet and the lists of
artists and characters.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta import paths
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, tag_counts
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest as listed


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs.")
@click.option("--database", type=FILE, help="danbooru2023.db.  [default: the database of --inputs]")
@click.option("--posts", type=FILE, default=paths.POSTS, help="The posts to caption.")
@click.option("--out", "--captions", "out", type=FILE, default=paths.CAPTIONS, help="The captions.")
@click.option("--artists", type=FILE, help="Images per artist.  [default: artists-kxl-delta.json beside --out]")
@click.option(
    "--characters", type=FILE, help="Images per character.  [default: characters-kxl-delta.json beside --out]"
)
def main(
    params: Path,
    inputs: Path,
    database: Path | None,
    posts: Path,
    out: Path,
    artists: Path | None,
    characters: Path | None,
) -> None:
    """Write the captions and count artists and characters."""
    recipe = recipes.load(params)
    ids = parquet.read(posts, ["post_id"])["post_id"].to_numpy()
    source = Database(database or listed.path(inputs, "database"))
    artists = artists or out.with_name("artists-kxl-delta.json")
    characters = characters or out.with_name("characters-kxl-delta.json")
    counts = tag_counts.TagCounter()
    captions.write_captions(source, ids, recipe.caption, out, counts)
    artist_counts, character_counts = counts.artists(), counts.characters()
    tag_counts.write_tag_counts(artist_counts, artists)
    tag_counts.write_tag_counts(character_counts, characters)
    print_summary(
        "caption",
        f"{len(ids):,} captions, {len(artist_counts):,} artists, {len(character_counts):,} characters → "
        f"{out}, {artists}, {characters}",
    )


if __name__ == "__main__":
    main()
