"""Training computed again from a saved state and compared with the journal.

A state serves if the journal continues its rows, which the chain shows; it does not matter whose work folder it is
from. `compare_losses` needs no state and no GPU: from a milestone's LoKr file it computes, forward only and in
float32, the losses of some micro-batches of the step that follows.

torch is imported inside functions, after numerics.enforce() has fixed the environment.
"""

from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.mappings import differing_keys
from kohaku_delta.params import NETWORK_WEIGHTS, Recipe
from kohaku_delta.printing import format_some
from kohaku_delta.training import journal as journals
from kohaku_delta.training import run_inputs
from kohaku_delta.training.journal import Journal

if TYPE_CHECKING:
    from kohaku_delta.training.lokr import LokrAdapter
    from kohaku_delta.training.training_context import TrainingContext

Files = dict[str, Any]  # paths of inputs, base, posts, captions, schedule, journal; tars, tokenizers if given by hand
Say = Callable[[str], object]
Step = tuple[int, str | None]  # a step, and how it differs from the journal

NUMBERS = {
    "gradient_norm": "the gradient's norm",
    "learning_rate_unet": "the U-Net's rate",
    "learning_rate_text": "the text encoders' rate",
    "scale": "the scaler",
}
# root mean square of relative loss differences: 14 times the most that fp16 training and fp16 files were seen to cause
# (docs/audit.md)
TOLERANCE = 1e-3
HARDWARE_PARAMETERS = {"train.device", "train.precision", "train.weights", "train.gradient_checkpointing"}


class LossPair(NamedTuple):
    """A micro-batch's loss: as the journal has it, and as computed here."""

    place: int
    journal: float
    ours: float


def replay_steps(
    recipe: Recipe, files: Files, work: Path, first: int, last: int, say: Say = lambda line: None
) -> Iterator[Step]:
    """Trains from the nearest saved state to step `last`. Yields (step, None) per equal step; ends with (step, how it
    differs) at the first other one. say: takes a sentence on where the computation begins, and on states passed over.
    """
    numerics.enforce(recipe.train.device)
    from kohaku_delta.training import batch_builder
    from kohaku_delta.training.training_loop import TrainingLoop

    journal = journals.read_journal(files["journal"])
    if not 0 <= first <= last < len(journal.rows):
        raise UserError(
            f"{files['journal']} has the steps 0 to {len(journal.rows) - 1}; {first} to {last} is not a range of them. "
            "Correct --from and --to."
        )
    context = _context(recipe, files, recipe.train.device)
    require_same_run(journal.header, context.header, files)
    folder, begin = nearest_state(work, journal, first, say)
    state = f"the state after {begin} steps in {folder}" if begin else f"step 0: {work} has no state for this journal"
    say(f"{last + 1 - begin} steps are computed, {begin} to {last}, from {state}")
    loop = TrainingLoop(recipe, context, folder)
    if begin:
        try:
            loop.resume_from(begin)
        except UserError as error:
            yield begin - 1, error.message
            return
    rows = [row for step in range(begin, last + 1) for row in loop.rows(step)]
    batches = batch_builder.load_batches(context.builder, loop.schedule, rows, recipe.execution.workers)
    names = sorted(context.adapter.tensors())
    for step in range(begin, last + 1):
        loop.step(step, batches)
        difference = first_step_difference(
            journal.rows[step], loop.journal.rows[-1], loop.micro_batches(step).to_pylist(), names
        )
        yield step, difference
        if difference:
            return


def _context(recipe: Recipe, files: Files, device: str) -> "TrainingContext":
    from kohaku_delta.training import training_context

    _, tokenizers = run_inputs.load_tokenizers(files)
    return training_context.build_context(recipe, files, tokenizers, run_inputs.tar_paths(files), device)


def require_same_run(recorded: dict, current: dict, files: Files, may_differ: Set[str] = frozenset()) -> None:
    """Raises UserError if base, start or parameters of the recipe are not those of the journal's header."""
    if recorded.get("base") != current["base"]:
        raise UserError(
            f"{files['base']} is not the base that {files['journal']} begins with. Name that base with --base."
        )
    starts = [header.get(NETWORK_WEIGHTS) for header in (recorded, current)]
    if starts[0] != starts[1]:
        began, begins = (f"the LoKr of sha256 {start}" if start else "a new LoKr" for start in starts)
        raise UserError(
            f"{files['journal']} began with {began}, and this recipe begins with {begins}. Name its inputs.json with "
            "--inputs."
        )
    differing = differing_keys(current["parameters"], recorded.get("parameters", {}))
    if differing := [key for key in differing if key not in may_differ]:
        raise UserError(
            f"{files['journal']} was trained with other parameters than the recipe has: {', '.join(differing)}. "
            "Name its params.yaml with --params."
        )


def nearest_state(work: Path, journal: Journal, first: int, say: Say = lambda line: None) -> tuple[Path, int]:
    """(folder, steps) of the latest state that this journal continues and that is not after step `first`; (work, 0) if
    there is none. say: takes a sentence on each later state that cannot be read.
    """
    from kohaku_delta.training import checkpointing, run_folders

    states = [
        (step, folder) for folder in sorted(work.glob("*")) for step in run_folders.saved_steps(folder) if step <= first
    ]
    for step, folder in sorted(states, reverse=True):
        state = run_folders.state_path(folder, step)
        try:
            rows = journals.read_journal(state / checkpointing.JOURNAL).rows
            with safetensors_io.open_file(state / checkpointing.STATE):
                pass
        except UserError as error:
            say(f"The state {state} is passed over: {error.message.split('. ')[0].rstrip('.')}.")
            continue
        if rows and rows[-1]["chain"] == journal.rows[step - 1]["chain"]:
            return folder, step
    return work, 0


def first_step_difference(
    theirs: dict, ours: dict, micro_batches: list[dict], names: list[str], they: str = "the journal says"
) -> str | None:
    """How two journal rows of one step differ, the first cause first: order, a micro-batch's loss, a lane's gradient,
    the update, a tensor. None if they are equal.

    micro_batches: the step's rows of the schedule; names: of the trained tensors, ascending; they: the words before a
    value of `theirs`.
    """
    if theirs["visits"] != ours["visits"]:
        return "schedule.parquet has other posts or visits in this step"
    losses = [np.asarray(row["losses"], np.float32).view(np.uint32) for row in (theirs, ours)]
    if len(losses[0]) != len(losses[1]):
        return f"the journal has {len(losses[0])} micro-batches, the schedule {len(losses[1])}"
    if places := np.flatnonzero(losses[0] != losses[1]).tolist():
        place, batch = places[0], micro_batches[places[0]]
        posts = ", ".join(map(str, batch["posts"]))
        values = f"{ours['losses'][place]!r}, {they} {theirs['losses'][place]!r}"
        count = (
            f"{len(places)} micro-batches differ"
            if len(places) > 1
            else "one micro-batch differs: its images, captions or visits were others"
        )
        return f"lane {batch['lane']}, place {place}: the loss of posts {posts} is {values} ({count})"
    if lanes := [lane for lane, (a, b) in enumerate(zip(theirs["lanes"], ours["lanes"], strict=True)) if a != b]:
        return f"lane {lanes[0]}: all losses are equal and the gradient is not"
    for key, name in NUMBERS.items():
        if theirs[key] != ours[key] and not (np.isnan(theirs[key]) and np.isnan(ours[key])):
            return f"all lanes are equal; {name} is {ours[key]!r}, {they} {theirs[key]!r}"
    if theirs["weights"] != ours["weights"]:
        tensors = [name for name, a, b in zip(names, theirs["tensors"], ours["tensors"], strict=True) if a != b]
        changed = format_some(tensors) or "a tensor that its short fingerprint does not show"
        return f"all lanes and the update are equal; {changed} came out with other bits"
    if theirs["optimizer"] != ours["optimizer"]:
        return "all weights are equal; the optimizer's state came out with other bits"
    if theirs["chain"] != ours["chain"]:
        return "the row is equal and its chain is not: the journal's earlier rows are of another run"
    return None


def sample_steps(steps: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers 0 … steps − 1, drawn without replacement, ascending."""
    return _draw([seed, 0], steps, count)


def _draw(key: list[int], total: int, count: int) -> list[int]:
    return sorted(np.random.Generator(np.random.Philox(key=key)).permutation(total)[:count].tolist())


def confidence(sampled: int, steps: int) -> str:
    """What a random sample shows: 1 − (1 − share)^sampled ≥ 95 % if share = 1 − 0.05^(1/sampled)."""
    share = 1 - 0.05 ** (1 / sampled)
    return (
        f"A random sample of {sampled} of {steps:,} steps finds a journal with {100 * share:.1f} % of its steps false "
        f"with 95 % probability, and one false step among all with {100 * sampled / steps:.1f} %."
    )


def compare_losses(
    recipe: Recipe, files: Files, lokr: Path, device: str, sample: int, seed: int
) -> tuple[int, list[LossPair]]:
    """(step, losses) of `sample` micro-batches, drawn by `seed`, of the step that follows a milestone's LoKr file."""
    numerics.enforce(device)
    import torch

    journal = journals.read_journal(files["journal"])
    hardware = {"device": device, "precision": "float32", "weights": "float32", "gradient_checkpointing": False}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=hardware)})
    context = _context(recipe, files, device)
    require_same_run(journal.header, context.header, files, HARDWARE_PARAMETERS)
    step = _load_lokr(lokr, context.adapter, recipe.lokr.alpha, len(journal.rows))
    rows = context.schedule.filter(pc.equal(context.schedule["step"], step)).to_pylist()
    if not rows or len(rows) != len(journal.rows[step]["losses"]):
        raise UserError(f"{files['schedule']} has other micro-batches of step {step} than {files['journal']}.")
    pairs = []
    for place in _draw([seed, step], len(rows), sample):
        row = rows[place]
        batch = context.builder.batch(row["posts"], row["visits"], (row["width"], row["height"]))
        with torch.no_grad():
            loss = context.model.losses(batch).mean().item()
        pairs.append(LossPair(place, journal.rows[step]["losses"][place], loss))
    return step, pairs


def _load_lokr(path: Path, adapter: "LokrAdapter", alpha: int, steps: int) -> int:
    """Copies a milestone's tensors into the adapter; returns the number of steps it was trained for."""
    with safetensors_io.open_file(path) as file:
        step = file.metadata.get("ss_steps", "")
        if not step.isdigit() or int(step) >= steps:
            raise UserError(
                f"{path} says that it was made after {step or 'no'} steps; a milestone of the steps 1 to {steps - 1} "
                "is needed."
            )
        adapter.load(file, alpha)
    return int(step)


def rms_relative_error(pairs: list[LossPair]) -> float:
    """The root mean square of the relative differences of losses."""
    return float(np.sqrt(np.mean([(pair.ours / pair.journal - 1) ** 2 for pair in pairs])))
