"""Invariant: which steps are computed anew is decided by the auditor's seed after the journal was handed over; what
that proves is said with it.

Steps are drawn without replacement and reached from the nearest saved state on the way of the journal, so every step
between is computed and compared too.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify import replay_training
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.findings import FAIL, PASS, SKIP, Finding

GROUP = "replay"


def sample_steps(steps: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers 0 … steps − 1, ascending."""
    return sorted(np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(steps)[:count].tolist())


def files(rebuild: Artifact, own: Path) -> dict[str, Path | None]:
    """What a replay reads: the rebuild's dataset, order and journal; inputs and base of the recipe's folder `own`."""
    build, ours = rebuild.folder / "build", own / "build"
    named = {name: build / f"{name}.parquet" for name in ("posts", "captions", "schedule", "journal")}
    return named | {
        "inputs": ours / "inputs.json",
        "base": ours / "delta-base.safetensors",
        "tars": None,
        "tokenizer": None,
        "tokenizer_2": None,
    }


def numerics_differences(rebuild: Artifact) -> list[str]:
    """What of the numerics contract differs here from what the train stage recorded; device, where this host has none
    of its kind.
    """
    device = rebuild.recipe.train.device
    try:
        numerics.enforce(device)
        here = numerics.describe(device)
    except UserError:
        return ["device"]
    train = rebuild.records.get("train")
    said = (train.numerics or {}) if train else {}
    return sorted(key for key, value in said.items() if here.get(key) != value)


def replay_sample(
    rebuild: Artifact, said: Journal, own: Path, count: int, seed: int
) -> Iterator[tuple[int, str | None]]:
    """(step, how it differs) of every step that is computed anew, until one differs."""
    named, work = files(rebuild, own), own / rebuild.recipe.execution.work
    groups: dict[tuple[Path, int], list[int]] = {}
    for step in sample_steps(len(said.rows), count, seed):
        groups.setdefault(replay_training.nearest_state(work, said, step), []).append(step)
    for steps in groups.values():
        for step, difference in replay_training.replay_steps(rebuild.recipe, named, work, steps[0], steps[-1]):
            yield step, difference
            if difference:
                return


def replay_finding(
    rebuild: Artifact, said: Journal | None, own: Path | None, count: int | None, seed: int, progress
) -> Finding:
    """The sample's outcome; on hardware that cannot give the same bits, of losses alone."""
    if not count:
        return Finding(GROUP, "steps", SKIP, "no step was computed anew: --replay N --seed S draws N of them")
    if said is None:
        return Finding(GROUP, "steps", SKIP, "there is no journal to compare with")
    own = own or (None if rebuild.bundle else rebuild.folder)
    if own is None:
        return Finding(
            GROUP,
            "steps",
            SKIP,
            "a bundle holds no weights and no pictures: name a recipe's folder of yours with --own, whose inputs and base serve",
        )
    count = min(count, len(said.rows))
    try:
        if other := numerics_differences(rebuild):
            return _losses(rebuild, own, count, seed, other)
        done = 0
        for step, difference in progress(replay_sample(rebuild, said, own, count, seed)):
            done += 1
            if difference:
                return Finding(GROUP, "steps", FAIL, f"step {step}: {difference}")
    except UserError as refusal:
        return Finding(GROUP, "steps", SKIP, f"could not be computed: {refusal.message}")
    return Finding(
        GROUP,
        "steps",
        PASS,
        f"{count} steps drawn with seed {seed} and the {done - count} on the way to them were computed anew: bit for bit. "
        f"{replay_training.confidence(count, len(said.rows))}",
    )


def _losses(rebuild: Artifact, own: Path, count: int, seed: int, other: list[str]) -> Finding:
    """Losses alone, after one milestone that the seed picks: the weaker evidence."""
    milestones = sorted((own / rebuild.recipe.execution.work).glob("*/delta-lokr-step*.safetensors"))
    why = f"this host differs from the trainer's in {', '.join(other)}, so bits cannot be compared"
    if not milestones:
        return Finding(
            GROUP, "steps", SKIP, f"{why}; and no milestone's LoKr file is there, from which losses could be"
        )
    chosen = milestones[sample_steps(len(milestones), 1, seed)[0]]
    step, found = replay_training.losses(rebuild.recipe, files(rebuild, own), chosen, "cpu", count, seed)
    distance = replay_training.rms_relative_error(found)
    weaker = "losses alone, which is weaker evidence (that these weights give these losses, not how they came about)"
    said = f"{why}; {weaker}: {len(found)} of step {step} are {distance:.1e} off, relative"
    return Finding(GROUP, "losses", PASS if distance <= replay_training.TOLERANCE else FAIL, said)
