"""statistics: counts and plots of the dataset. Reads the outputs of select, filter, caption and schedule; writes
dataset.json and statistics/.
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
from kohaku_delta.dataset import published_counts
from kohaku_delta.hub import inputs_manifest as listed
from kohaku_delta.report import dataset_files
from kohaku_delta.sdxl.tokenizer import ClipTokenizer


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs.")
@click.option("--database", type=FILE, help="danbooru2023.db.  [default: the database of --inputs]")
@click.option(
    "--tokenizer", type=FILE, help="The folder of vocab.json and merges.txt.  [default: the tokenizer of --inputs]"
)
@click.option("--selection", type=FILE, default=paths.SELECTION, help="The selected posts.")
@click.option("--posts", type=FILE, default=paths.POSTS, help="The posts to train on.")
@click.option("--dropped", type=FILE, default=paths.DROPPED, help="The dropped posts.")
@click.option("--captions", type=FILE, default=paths.CAPTIONS, help="The captions.")
@click.option("--artists", type=FILE, default=paths.ARTISTS, help="Images per artist.")
@click.option("--characters", type=FILE, default=paths.CHARACTERS, help="Images per character.")
@click.option("--buckets", type=FILE, default=paths.BUCKETS, help="Images per bucket.")
@click.option("--out", type=FILE, default=paths.DATASET, help="The figures.")
@click.option("--pictures", "folder", type=FILE, default=paths.STATISTICS, help="The folder of the plots.")
def main(
    params: Path, inputs: Path, database: Path | None, tokenizer: Path | None, out: Path, folder: Path, **files: Path
) -> None:
    """Count the dataset, compare it with the published counts, and plot it."""
    recipe = recipes.load(params)
    source = Database(database or listed.path(inputs, "database"))
    tokens = ClipTokenizer(*listed.tokenizer(inputs, "tokenizer", tokenizer))
    figures, comparison = dataset_files.write_statistics(recipe, source, tokens, files, out, folder)
    print_summary(
        "statistics",
        f"{figures['trained']:,} posts, {figures['steps']:,} steps; "
        f"{published_counts.comparison_sentence(comparison)} → {out}, {folder}",
    )


if __name__ == "__main__":
    main()
