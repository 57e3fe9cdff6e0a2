"""When a training has diverged and must stop. It follows from the journal alone, so every rank, a resumed run and an
audit decide the same. Needs no torch.

A smaller loss scale fixes a gradient that overflows. It cannot fix a forward loss that is NaN or infinite, because the
scale is applied after the loss.
"""

from math import isfinite

NON_FINITE_LOSSES = 3  # in consecutive steps that all have one
LOWEST_SCALE = 1.0  # at 1 nothing is scaled, and a gradient that overflows all the same stays so
LONGEST_OVERFLOW = 20  # steps in a row: they made the loss scale a million times smaller


def non_finite_places(losses: list[float]) -> list[int]:
    """The places in a step whose loss is NaN or infinite."""
    return [place for place, loss in enumerate(losses) if not isfinite(loss)]


def losses_diverged(steps: list[list[float]]) -> bool:
    """Whether the newest consecutive steps that all have a loss that is not finite have NON_FINITE_LOSSES of them.

    steps: each step's losses, the newest last.
    """
    count = 0
    for losses in reversed(steps):
        places = non_finite_places(losses)
        count += len(places)
        if count >= NON_FINITE_LOSSES or not places:
            break
    return count >= NON_FINITE_LOSSES
