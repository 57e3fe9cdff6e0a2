"""kohaku-delta set-aside: makes room for another training; the unfinished one is kept, and can be resumed later."""

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.training import run_folders


@click.command(cls=StageCommand)
@click.argument("folder", metavar="[RECIPE]", type=FILE, default=".")
@click.option("--work", type=FILE, help="Folder of the training state.  [default: execution.work]")
def set_aside(folder: Path, work: Path | None) -> None:
    """Set the unfinished trainings of the recipe in folder RECIPE (default: .) aside, so that another one can begin.

    Nothing is lost: their folders are renamed, and a training with the inputs of one goes on with it.
    """
    work = work or folder / recipes.load(folder / dvc_yaml.PARAMS).execution.work
    runs = run_folders.set_aside(work)
    for run in runs:
        print_line(f"{run.folder} ({run.progress}) → {run_folders.set_aside_path(run.folder)}")
        if run.inputs is None:
            print_line(f"  {run.fault} The training is found by the name of its folder.")
    if runs:
        print_line(
            "To go on with one, restore what it was trained with (its depends.json names it) and run `dvc repro`."
        )
    else:
        print_line(f"{work} holds no unfinished training; nothing was moved.")
