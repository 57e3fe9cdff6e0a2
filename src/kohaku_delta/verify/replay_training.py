"""Invariant: a stretch of training is computed anew from a saved state and compared with the journal row by row; what
is told is the first difference.

A state serves if the journal continues its rows, which the chain shows; whose work folder it comes from does not
matter. `losses` needs no state and no card: from a LoKr file it computes, forward only and in fp32, the losses of some
micro-batches of the step that followed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe

NUMBERS = {
    "gradient_norm": "the gradient's norm",
    "learning_rate_unet": "the U-Net's rate",
    "learning_rate_text": "the text encoders' rate",
    "scale": "the scaler",
}
SHOWN = 3
# of losses, relative, root mean square: 14 times the most that fp16 training and fp16 files were seen to move them
# (docs/replay.md)
TOLERANCE = 1e-3
ELSEWHERE = {
    "train.device",
    "train.precision",
    "train.weights",
    "train.gradient_checkpointing",
}  # what losses on other hardware may differ in


class LossPair(NamedTuple):
    """A micro-batch's loss as the journal has it, and as it was computed."""

    place: int
    journal: float
    ours: float


def replay_steps(
    recipe: Recipe, files: dict[str, Path], work: Path, first: int, last: int
) -> Iterator[tuple[int, str | None]]:
    """Yields (step, None) for every step that is equal, from the nearest state to `last`; ends with (step, how it
    differs) at the first that is not.
    """
    numerics.enforce(recipe.train.device)
    from kohaku_delta.training import batch_builder, trainer
    from kohaku_delta.training import journal as journals
    from kohaku_delta.training.training_loop import TrainingLoop

    said = journals.read_journal(files["journal"])
    if not 0 <= first <= last < len(said.rows):
        raise UserError(
            f"{files['journal']} has the steps 0 to {len(said.rows) - 1}; {first} to {last} is no stretch of them. Correct --from and --to."
        )
    _, texts = trainer.load_tokenizers(files)
    parts = trainer.build_context(recipe, files, texts, trainer.tar_paths(files), recipe.train.device)
    require_same_run(said.header, parts.header, files, set())
    folder, begin = nearest_state(work, said, first)
    loop = TrainingLoop(recipe, parts, folder)
    if begin:
        try:
            loop.resume_from(begin)
        except UserError as refusal:
            yield begin - 1, refusal.message
            return
    rows = [row for step in range(begin, last + 1) for row in loop.rows(step)]
    batches = batch_builder.load_batches(parts.builder, loop.schedule, rows, recipe.execution.workers)
    for step in range(begin, last + 1):
        loop.step(step, batches)
        theirs, ours = said.rows[step], loop.journal.rows[-1]
        what = first_step_difference(
            theirs, ours, loop.micro_batches(step).to_pylist(), sorted(parts.adapter.tensors())
        )
        yield step, what
        if what:
            return


def require_same_run(theirs: dict, ours: dict, files: dict[str, Path], but: set[str]) -> None:
    """Refuses a recipe or a base that is not the journal's; names the parameters. `but`: those that may differ."""
    if theirs.get("base") != ours["base"]:
        raise UserError(
            f"{files['base']} is not the base that {files['journal']} begins with. Name that base with --base."
        )
    said = theirs.get("parameters", {})
    other = sorted(
        key
        for key in said.keys() | ours["parameters"].keys()
        if said.get(key) != ours["parameters"].get(key) and key not in but
    )
    if other:
        raise UserError(
            f"{files['journal']} was trained with other parameters than the recipe has: {', '.join(other)}. Name its params.yaml with --params."
        )


def nearest_state(work: Path, said, first: int) -> tuple[Path, int]:
    """The folder and steps of the latest state from which step `first` is reached, and that this journal continues;
    (work, 0) for none.
    """
    from kohaku_delta.training import checkpointing
    from kohaku_delta.training import journal as journals

    found = [
        (step, folder)
        for folder in sorted(work.glob("*"))
        for step in checkpointing.saved_steps(folder)
        if step <= first
    ]
    for step, folder in sorted(found, reverse=True):
        here = checkpointing.state_path(folder, step) / checkpointing.JOURNAL
        try:
            rows = journals.read_journal(here).rows
        except UserError:
            continue
        if rows and rows[-1]["chain"] == said.rows[step - 1]["chain"]:
            return folder, step
    return work, 0


def first_step_difference(
    theirs: dict, ours: dict, schedule: list[dict], names: list[str], they: str = "the journal says"
) -> str | None:
    """How two rows of one step differ, first cause first: the order, a micro-batch's loss, a lane's gradient, the
    update, a tensor. None: not at all.

    schedule: the step's micro-batches; names: of the trained tensors, ascending; they: the words before what `theirs`
    has.
    """
    if theirs["visits"] != ours["visits"]:
        return "schedule.parquet has other posts or visits in this step"
    losses = [np.asarray(row["losses"], np.float32).view(np.uint32) for row in (theirs, ours)]
    if len(losses[0]) != len(losses[1]):
        return f"the journal has {len(losses[0])} micro-batches, the schedule {len(losses[1])}"
    if other := np.flatnonzero(losses[0] != losses[1]).tolist():
        lane, posts = schedule[other[0]]["lane"], schedule[other[0]]["posts"]
        return (
            f"lane {lane}, place {other[0]}: the loss of posts {', '.join(map(str, posts))} is {ours['losses'][other[0]]!r}, {they} {theirs['losses'][other[0]]!r}"
            + (
                f" ({len(other)} micro-batches differ)"
                if len(other) > 1
                else " (one micro-batch differs: its pictures, captions or visits were others)"
            )
        )
    if other := [lane for lane, (a, b) in enumerate(zip(theirs["lanes"], ours["lanes"], strict=True)) if a != b]:
        return f"lane {other[0]}: all losses are equal and the gradient is not"
    for key, name in NUMBERS.items():
        if theirs[key] != ours[key] and not (theirs[key] != theirs[key] and ours[key] != ours[key]):
            return f"all lanes are equal; {name} is {ours[key]!r}, {they} {theirs[key]!r}"
    if theirs["weights"] != ours["weights"]:
        other = [name for name, a, b in zip(names, theirs["tensors"], ours["tensors"], strict=True) if a != b]
        shown = ", ".join(other[:SHOWN]) or "a tensor that its mark does not name"
        return f"all lanes and the update are equal; {shown}{f' and {len(other) - SHOWN} more' if len(other) > SHOWN else ''} came out with other bits"
    if theirs["optimizer"] != ours["optimizer"]:
        return "all weights are equal; the optimizer's state came out with other bits"
    return (
        None
        if theirs["chain"] == ours["chain"]
        else "the row is equal and its chain is not: the journal's earlier rows are of another run"
    )


def confidence(done: int, steps: int) -> str:
    """What a random sample of so many of all steps shows: 1 − (1 − share)^done ≥ 95 % where share = 1 − 0.05^(1/done)."""
    share = 1 - 0.05 ** (1 / done)
    return (
        f"A random sample of {done} of {steps:,} steps finds a journal with {100 * share:.1f} % of its steps false with 95 % probability, "
        f"and one false step among all with {100 * done / steps:.1f} %."
    )


def losses(
    recipe: Recipe, files: dict[str, Path], lokr: Path, device: str, sample: int, seed: int
) -> tuple[int, list[LossPair]]:
    """(step, losses) of `sample` micro-batches of the step that follows a milestone's LoKr file, drawn by `seed`;
    forward only, in fp32, on `device`.
    """
    numerics.enforce(device)
    import torch

    from kohaku_delta.formats import safetensors_io
    from kohaku_delta.training import journal as journals
    from kohaku_delta.training import trainer

    said = journals.read_journal(files["journal"])
    _, texts = trainer.load_tokenizers(files)
    elsewhere = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(
                update={"device": device, "precision": "float32", "weights": "float32", "gradient_checkpointing": False}
            )
        }
    )
    parts = trainer.build_context(elsewhere, files, texts, trainer.tar_paths(files), device)
    require_same_run(said.header, parts.header, files, ELSEWHERE)
    with safetensors_io.open_file(lokr) as file:
        step = file.metadata.get("ss_steps", "")
        if not step.isdigit() or int(step) >= len(said.rows):
            raise UserError(
                f"{lokr} says that it was made after {step or 'no'} steps; a milestone of the steps 1 to {len(said.rows) - 1} is needed."
            )
        if missing := sorted(parts.adapter.tensors().keys() - file.specs.keys()):
            raise UserError(f"{lokr} has no {missing[0]}: it is not a LoKr of this recipe.")
        for name, weight in parts.adapter.tensors().items():
            if file.specs[name].shape != tuple(weight.shape):
                raise UserError(
                    f"{lokr}: {name} has the shape {list(file.specs[name].shape)}; the recipe's is {list(weight.shape)}."
                )
            weight.copy_(torch.from_numpy(file.float32(name).copy()))
    rows = parts.schedule.filter(pc.equal(parts.schedule["step"], int(step))).to_pylist()
    chosen = sorted(
        np.random.Generator(np.random.Philox(key=[seed, int(step)])).permutation(len(rows))[:sample].tolist()
    )
    found = []
    with torch.no_grad():
        for place in chosen:
            batch = parts.builder.batch(
                rows[place]["posts"], rows[place]["visits"], (rows[place]["width"], rows[place]["height"])
            )
            found.append(
                LossPair(place, said.rows[int(step)]["losses"][place], parts.model.losses(batch).mean().item())
            )
    return int(step), found


def rms_relative_error(compared: list[LossPair]) -> float:
    """The root mean square of the relative differences."""
    return float(np.sqrt(np.mean([(each.ours / each.journal - 1) ** 2 for each in compared])))
