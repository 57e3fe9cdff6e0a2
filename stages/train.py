"""train: the LoKr. Reads base, posts, captions, schedule, tars; writes delta-lokr.safetensors, journal.parquet,
curves.csv. State is kept in work/.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import StageCommand, print_summary
from kohaku_delta.errors import UserError

FILE = click.Path(path_type=Path)


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--inputs",
    type=FILE,
    default="build/inputs.json",
    show_default=True,
    help="The verified inputs (tokenizers, tars).",
)
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: that of --inputs]")
@click.option(
    "--tokenizer", type=FILE, help="Folder with vocab.json and merges.txt.  [default: the tokenizer of --inputs]"
)
@click.option(
    "--tokenizer-2", type=FILE, help="The same for the second text encoder.  [default: the tokenizer_2 of --inputs]"
)
@click.option(
    "--base", type=FILE, default="build/delta-base.safetensors", show_default=True, help="The checkpoint to train on."
)
@click.option("--posts", type=FILE, default="build/posts.parquet", show_default=True)
@click.option("--captions", type=FILE, default="build/captions.parquet", show_default=True)
@click.option("--schedule", type=FILE, default="build/schedule.parquet", show_default=True)
@click.option(
    "--ranks",
    type=click.IntRange(1),
    help="Processes (GPUs) that share the lanes; decides time, never bits.  [default: execution.ranks]",
)
@click.option("--work", type=FILE, help="Where the training state is kept.  [default: execution.work]")
@click.option("--out", type=FILE, default="build/delta-lokr.safetensors", show_default=True, help="The LoKr file.")
@click.option("--journal", type=FILE, default="build/journal.parquet", show_default=True, help="A row a step.")
@click.option(
    "--curves",
    type=FILE,
    default="build/curves.csv",
    show_default=True,
    help="Loss, gradient norm and rates, for plots.",
)
def main(params: Path, ranks: int | None, work: Path | None, **files) -> None:
    """Train the LoKr."""
    recipe = recipes.load(params)
    ranks = ranks or recipe.execution.ranks
    numerics.prepare()
    from kohaku_delta.training import (
        gradient_reduction,
        rank_processes,
        trainer,
    )  # they import torch, which must find the numerics fixed

    if not rank_processes.is_rank():
        gradient_reduction.lanes_of_rank(recipe.schedule.lanes, 0, ranks)
        for path in (files["base"], files["posts"], files["captions"], files["schedule"]):
            if not path.is_file():
                raise UserError(
                    f"{path} is not there. Run the stage that writes it (`dvc repro`), or name the file by its option."
                )
        (
            trainer.load_tokenizers(files),
            trainer.tar_paths(files),
        )  # if an input must be hashed again, once and not by every rank
        if ranks > 1:
            rank_processes.launch_ranks(ranks, sys.argv[1:])
            return
    else:
        rank_processes.die_with_parent()
    line = trainer.train(recipe, files, work or Path(recipe.execution.work))
    if line:
        print_summary("train", line)


if __name__ == "__main__":
    main()
