"""Invariant: a stretch of training is computed anew from a saved state and compared with the journal row by row; what is told is the first difference.

A state serves if the journal continues its rows, which the chain shows; whose work folder it comes from does not matter. `losses` needs no
state and no card: from a LoKr file it computes, forward only and in fp32, the losses of some micro-batches of the step that followed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from kohaku_delta import numerics
from kohaku_delta.params import Recipe
from kohaku_delta.refusal import Refusal

NUMBERS = {"gradient_norm": "the gradient's norm", "learning_rate_unet": "the U-Net's rate", "learning_rate_text": "the text encoders' rate", "scale": "the scaler"}
SHOWN = 3
TOLERANCE = 1e-3  # of losses, relative, root mean square: 14 times the most that fp16 training and fp16 files were seen to move them (docs/replay.md)
ELSEWHERE = {"train.device", "train.precision", "train.weights", "train.gradient_checkpointing"}  # what losses on other hardware may differ in


class Compared(NamedTuple):
    """A micro-batch's loss as the journal has it, and as it was computed."""

    place: int
    journal: float
    ours: float


def replay(recipe: Recipe, files: dict[str, Path], work: Path, first: int, last: int) -> Iterator[tuple[int, str | None]]:
    """Yields (step, None) for every step that is equal, from the nearest state to `last`; ends with (step, how it differs) at the first that is not."""
    numerics.hold(recipe.train.device)
    from kohaku_delta.training import journal as journals
    from kohaku_delta.training import loader, run, state
    from kohaku_delta.training.loop import Loop

    said = journals.read(files["journal"])
    if not 0 <= first <= last < len(said.rows):
        raise Refusal(f"{files['journal']} has the steps 0 to {len(said.rows) - 1}; {first} to {last} is no stretch of them. Correct --from and --to.")
    _, texts = run.tokenizers(files)
    parts = run.parts(recipe, files, texts, run.tars(files), recipe.train.device)
    same_run(said.header, parts.header, files, set())
    folder, begin = nearest(work, said, first)
    loop = Loop(recipe, parts, folder)
    if begin:
        try:
            loop.take_up(begin)
        except Refusal as refusal:
            yield begin - 1, refusal.message
            return
    rows = [row for step in range(begin, last + 1) for row in loop.rows(step)]
    batches = loader.batches(parts.source, loop.schedule, rows, recipe.execution.workers)
    for step in range(begin, last + 1):
        loop.step(step, batches)
        theirs, ours = said.rows[step], loop.journal.rows[-1]
        what = difference(theirs, ours, loop.micro_batches(step).to_pylist(), sorted(parts.adapter.tensors()))
        yield step, what
        if what:
            return


def same_run(theirs: dict, ours: dict, files: dict[str, Path], but: set[str]) -> None:
    """Refuses a recipe or a base that is not the journal's; names the parameters. `but`: those that may differ."""
    if theirs.get("base") != ours["base"]:
        raise Refusal(f"{files['base']} is not the base that {files['journal']} begins with. Name that base with --base.")
    said = theirs.get("parameters", {})
    other = sorted(key for key in said.keys() | ours["parameters"].keys() if said.get(key) != ours["parameters"].get(key) and key not in but)
    if other:
        raise Refusal(f"{files['journal']} was trained with other parameters than the recipe has: {', '.join(other)}. Name its params.yaml with --params.")


def nearest(work: Path, said, first: int) -> tuple[Path, int]:
    """The folder and steps of the latest state from which step `first` is reached, and that this journal continues; (work, 0) for none."""
    from kohaku_delta.training import journal as journals
    from kohaku_delta.training import state

    found = [(step, folder) for folder in sorted(work.glob("*")) for step in state.saved(folder) if step <= first]
    for step, folder in sorted(found, reverse=True):
        here = state.place(folder, step) / state.JOURNAL
        try:
            rows = journals.read(here).rows
        except Refusal:
            continue
        if rows and rows[-1]["chain"] == said.rows[step - 1]["chain"]:
            return folder, step
    return work, 0


def difference(theirs: dict, ours: dict, schedule: list[dict], names: list[str], they: str = "the journal says") -> str | None:
    """How two rows of one step differ, first cause first: the order, a micro-batch's loss, a lane's gradient, the update, a tensor. None: not at all.

    schedule: the step's micro-batches; names: of the trained tensors, ascending; they: the words before what `theirs` has."""
    if theirs["visits"] != ours["visits"]:
        return "schedule.parquet has other posts or visits in this step"
    losses = [np.asarray(row["losses"], np.float32).view(np.uint32) for row in (theirs, ours)]
    if len(losses[0]) != len(losses[1]):
        return f"the journal has {len(losses[0])} micro-batches, the schedule {len(losses[1])}"
    if other := np.flatnonzero(losses[0] != losses[1]).tolist():
        lane, posts = schedule[other[0]]["lane"], schedule[other[0]]["posts"]
        return f"lane {lane}, place {other[0]}: the loss of posts {', '.join(map(str, posts))} is {ours['losses'][other[0]]!r}, {they} {theirs['losses'][other[0]]!r}" + (
            f" ({len(other)} micro-batches differ)" if len(other) > 1 else " (one micro-batch differs: its pictures, captions or visits were others)"
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
    return None if theirs["chain"] == ours["chain"] else "the row is equal and its chain is not: the journal's earlier rows are of another run"


def confidence(done: int, steps: int) -> str:
    """What a random sample of so many of all steps shows: 1 − (1 − share)^done ≥ 95 % where share = 1 − 0.05^(1/done)."""
    share = 1 - 0.05 ** (1 / done)
    return (
        f"A random sample of {done} of {steps:,} steps finds a journal with {100 * share:.1f} % of its steps false with 95 % probability, "
        f"and one false step among all with {100 * done / steps:.1f} %."
    )


def losses(recipe: Recipe, files: dict[str, Path], lokr: Path, device: str, sample: int, seed: int) -> tuple[int, list[Compared]]:
    """(step, losses) of `sample` micro-batches of the step that follows a milestone's LoKr file, drawn by `seed`; forward only, in fp32, on `device`."""
    numerics.hold(device)
    import torch

    from kohaku_delta.checkpoint import stream
    from kohaku_delta.training import journal as journals
    from kohaku_delta.training import run

    said = journals.read(files["journal"])
    _, texts = run.tokenizers(files)
    elsewhere = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": device, "precision": "float32", "weights": "float32", "gradient_checkpointing": False})})
    parts = run.parts(elsewhere, files, texts, run.tars(files), device)
    same_run(said.header, parts.header, files, ELSEWHERE)
    with stream.open_file(lokr) as file:
        step = file.metadata.get("ss_steps", "")
        if not step.isdigit() or int(step) >= len(said.rows):
            raise Refusal(f"{lokr} says that it was made after {step or 'no'} steps; a milestone of the steps 1 to {len(said.rows) - 1} is needed.")
        if missing := sorted(parts.adapter.tensors().keys() - file.specs.keys()):
            raise Refusal(f"{lokr} has no {missing[0]}: it is not a LoKr of this recipe.")
        for name, weight in parts.adapter.tensors().items():
            if file.specs[name].shape != tuple(weight.shape):
                raise Refusal(f"{lokr}: {name} has the shape {list(file.specs[name].shape)}; the recipe's is {list(weight.shape)}.")
            weight.copy_(torch.from_numpy(file.float32(name).copy()))
    rows = parts.schedule.filter(pc.equal(parts.schedule["step"], int(step))).to_pylist()
    chosen = sorted(np.random.Generator(np.random.Philox(key=[seed, int(step)])).permutation(len(rows))[:sample].tolist())
    found = []
    with torch.no_grad():
        for place in chosen:
            batch = parts.source.batch(rows[place]["posts"], rows[place]["visits"], (rows[place]["width"], rows[place]["height"]))
            found.append(Compared(place, said.rows[int(step)]["losses"][place], parts.model.losses(batch).mean().item()))
    return int(step), found


def distance(compared: list[Compared]) -> float:
    """The root mean square of the relative differences."""
    return float(np.sqrt(np.mean([(each.ours / each.journal - 1) ** 2 for each in compared])))
