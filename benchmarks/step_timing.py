"""What a training step costs, for benchmarks/train.py (the miniature, on the CPU) and gpu_check.py (SDXL, on a card):
the three forms of the LoKr, torch's deterministic mode, the journal. What is compared takes turns in one process.
"""

import statistics
import time
from collections.abc import Callable

import torch

from kohaku_delta.params import Recipe
from kohaku_delta.training import journal, tensor_fingerprints
from kohaku_delta.training.batch_builder import Batch
from kohaku_delta.training.lokr import LokrAdapter
from kohaku_delta.training.training_context import TrainingContext
from kohaku_delta.training.training_loop import TrainingLoop

FORMS = ("factors", "delta", "bypass")  # ours, LyCORIS's default, LyCORIS's bypass form


def with_lokr_form(recipe: Recipe, form: str) -> Recipe:
    """The recipe with the LoKr computed in this way."""
    return recipe.model_copy(
        update={"lokr": recipe.lokr.model_copy(update={"forward": "factors" if form == "factors" else "delta"})}
    )


def use_bypass_form(adapter: LokrAdapter, form: str) -> None:
    if form == "bypass":
        for entry in adapter.entries.values():
            if hasattr(entry, "lokr_w1"):
                entry.bypass_mode = True


def synchronize(device: str) -> None:
    """Wait until the card has computed what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_forward_backward(parts: TrainingContext, batches: list[Batch]) -> float:
    """Seconds of forward and backward of these micro-batches."""
    began = time.perf_counter()
    for batch in batches:
        parts.model.losses(batch).mean().backward()
        for _, weight in parts.adapter.trained():
            weight.grad = None
    synchronize(parts.model.device)
    return time.perf_counter() - began


def alternate_rounds(rounds: int, works: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median seconds of each, after one turn that is not counted."""
    found = {name: [work() for _ in range(1)] for name, work in works.items()}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(work())
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def nondeterministic(work: Callable[[], float]) -> Callable[[], float]:
    """The same without torch's deterministic mode."""

    def loose() -> float:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        try:
            return work()
        finally:
            torch.backends.cudnn.deterministic = True
            torch.use_deterministic_algorithms(True)

    return loose


def time_journal(loop: TrainingLoop) -> float:
    """Seconds that a step's journal row takes, its fingerprints included."""
    lane = torch.zeros(sum(weight.numel() for _, weight in loop.trained), device=loop.model.device)
    synchronize(loop.model.device)
    began = time.perf_counter()
    for _ in loop.lanes:
        tensor_fingerprints.tensor_fingerprint(lane)
    weights = tensor_fingerprints.fingerprints(loop.adapter.tensors())
    (
        tensor_fingerprints.combine(weights),
        tensor_fingerprints.combine(tensor_fingerprints.fingerprints(loop.optimizer.tensors())),
        tensor_fingerprints.short_fingerprints(weights),
    )
    journal.visits_digest(loop.micro_batches(0).to_pylist())
    synchronize(loop.model.device)
    return time.perf_counter() - began
