"""kohaku-delta watch: does a training that is under way make the model better? Curve and pictures of its milestones."""

import re
from pathlib import Path
from typing import Any

import click

from kohaku_delta import numerics, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import dvc_yaml

INPUTS = {"inputs": paths.INPUTS, "selection": paths.SELECTION, "base": paths.BASE}
BY_HAND = dict.fromkeys(("database", "tars", "tokenizer", "tokenizer_2"))  # options of the stage, unused here


@click.command(cls=StageCommand)
@click.argument("recipe", type=FILE, default=".")
@click.option("--device", default="cpu", metavar="cpu|cuda[:N]", help="Where to measure: not on a card that trains.")
@click.option("--work", type=FILE, help="The folder of the training states.  [default: execution.work of the recipe]")
def watch(recipe: Path, device: str, work: Path | None) -> None:
    """Measure the milestones of a training in RECIPE's work folder, also while it runs.

    Writes milestones.csv (held-out loss by step) and milestones.png (the preview's prompts) into work/KEY/watch/, and
    nothing else. Milestones that were measured before are not measured again.
    """
    values = recipes.load(recipe / dvc_yaml.PARAMS)
    files: dict[str, Any] = {name: recipe / path for name, path in INPUTS.items()}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} does not exist. Name the folder of the recipe that is trained.")
    numerics.prepare()
    # these import torch, which must find the numerics fixed
    from kohaku_delta.preview import watch_training

    run, *others = watch_training.find_runs(work or recipe / values.execution.work)
    if others:
        names = ", ".join(f"{other.folder.name} ({other.done:,} of {other.steps:,} steps)" for other in others)
        print_line(f"watch: other trainings there, not measured: {names}")
    print_line(f"watch: {run.folder}, {run.done:,} of {run.steps:,} steps saved")
    measured, new = watch_training.watch(_on_device(values, device), files | BY_HAND, run.folder)
    for step, (_, losses) in measured.items():
        loss = f"held-out loss {losses['sdxl']:.4f}" if losses else "no held-out post"
        print_line(f"  step {step:>8,}  {loss}{'' if step in new else ', measured before'}")
    if len(measured) == 1:
        print_line(f"  no milestone yet: there is one every {values.train.milestone_every:,} steps")
    folder = run.folder / watch_training.FOLDER
    print_line(f"→ {folder / Path(paths.MILESTONES_CSV).name}, {folder / Path(paths.MILESTONES_PNG).name}")


def _on_device(recipe: Recipe, device: str) -> Recipe:
    """The recipe, to be measured on another device; a CPU computes in float32. Raises UserError if it is not here."""
    match = re.fullmatch(r"(cpu|cuda)(?::(\d{1,3}))?", device)
    if not match or (match[1] == "cpu" and match[2]):
        raise click.BadParameter(f"{device!r} is neither cpu nor cuda nor cuda:N.", param_hint="--device")
    kind, changed = match[1], {"device": match[1]}
    if kind == "cpu":
        changed["precision"] = "float32"
    else:
        import torch

        number, count = int(match[2] or 0), torch.cuda.device_count()
        if number >= count:
            raise UserError(f"--device {device}: torch finds {count} CUDA devices here, counted from 0.")
        torch.cuda.set_device(number)
    numerics.enforce(kind)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changed)})
