"""train: the LoKr. Reads base, posts, captions, schedule, tars; writes delta-lokr.safetensors, milestones/,
journal.parquet and curves.csv. The training state is in work/.
"""

import os
import sys

sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")

from pathlib import Path

import click

from kohaku_delta import numerics, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand, print_summary
from kohaku_delta.errors import UserError
from kohaku_delta.training import rank_processes


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs (tokenizers, tars).")
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: from --inputs]")
@click.option("--tokenizer", type=FILE, help="Folder with vocab.json and merges.txt.  [default: from --inputs]")
@click.option("--tokenizer-2", type=FILE, help="The same for text encoder 2.  [default: from --inputs]")
@click.option("--base", type=FILE, default=paths.BASE, help="The checkpoint to train on.")
@click.option(
    "--network-weights",
    type=FILE,
    help="A LoKr of this base to begin with.  [default: network_weights of --inputs, if it is there; else a new one]",
)
@click.option("--posts", type=FILE, default=paths.POSTS, help="The posts to train on.")
@click.option("--captions", type=FILE, default=paths.CAPTIONS, help="Their captions.")
@click.option("--schedule", type=FILE, default=paths.SCHEDULE, help="Every micro-batch of every step.")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    help="Processes (GPUs) that share the lanes; changes the time, not the bits.  [default: execution.ranks]",
)
@click.option("--work", type=FILE, help="Folder of the training state.  [default: execution.work]")
@click.option("--out", type=FILE, default=paths.LOKR, help="The LoKr file.")
@click.option("--milestones", type=FILE, default=paths.MILESTONES, help="Folder of a LoKr every train.milestone_every.")
@click.option("--journal", type=FILE, default=paths.JOURNAL, help="One row per step.")
@click.option("--curves", type=FILE, default=paths.CURVES, help="Loss, gradient norm and learning rates, for plots.")
def main(params: Path, ranks: int | None, work: Path | None, **files) -> None:
    """Train the LoKr."""
    recipe = recipes.load(params)
    ranks = ranks or recipe.execution.ranks
    numerics.prepare()
    # these import torch, which must find the numerics fixed
    from kohaku_delta.training import gradient_reduction, run_inputs, trainer

    if not rank_processes.is_rank():
        gradient_reduction.lanes_of_rank(recipe.schedule.lanes, 0, ranks)
        for name in ("base", "posts", "captions", "schedule"):
            if not files[name].is_file():
                raise UserError(
                    f"{files[name]} does not exist. Run the stage that writes it (`dvc repro`), or name the file with "
                    f"--{name}."
                )
        # an input that must be hashed again is hashed once, here, and not by every rank
        run_inputs.load_tokenizers(files)
        run_inputs.tar_paths(files)
        run_inputs.network_weights(files)
        if ranks > 1:
            rank_processes.launch_ranks(ranks, sys.argv[1:])
            return
    line = trainer.train(recipe, files, work or Path(recipe.execution.work))
    if line:
        print_summary("train", line)


if __name__ == "__main__":
    rank_processes.run(main)
