"""Invariant: a step's gradient is one fixed sum: micro-batches in order within a lane, lanes in a balanced binary tree.

Rank r of W owns lanes r·L/W … (r+1)·L/W − 1, which is a whole subtree (L and W are powers of two), so any W gives the
same bits. A rank keeps one buffer a level of its subtree, not one a lane.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from kohaku_delta.errors import UserError


def lanes_of_rank(lanes: int, rank: int, ranks: int) -> range:
    """The lanes of a rank."""
    if lanes % ranks:
        raise UserError(
            f"{ranks} ranks cannot share {lanes} lanes: schedule.lanes must be a multiple of the number of ranks. Use {lanes}, or a divisor of it."
        )
    share = lanes // ranks
    return range(rank * share, (rank + 1) * share)


class PairwiseSum:
    """Adds buffers pairwise like a binary counter: after n = 2^k buffers one is left, the balanced tree's sum."""

    def __init__(self):
        self.levels: list[tuple[int, torch.Tensor]] = []

    def add(self, buffer: torch.Tensor) -> None:
        level = 0
        while self.levels and self.levels[-1][0] == level:
            buffer = self.levels.pop()[1].add_(buffer)
            level += 1
        self.levels.append((level, buffer))

    def sum(self) -> torch.Tensor:
        ((_, total),) = self.levels
        return total


@contextmanager
def collective_errors():
    """What the ranks do together: a rank that is lost on the way is a sentence on the others."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo raises nothing narrower
        raise UserError(
            f"Rank {dist.get_rank()} lost the others ({str(error).split('. ')[0]}). Saved steps are kept."
        ) from None


def mismatching_ranks(number: int, ranks: int, device: str) -> list[int]:
    """The ranks whose number (0 … 2^64 − 1) is not rank 0's: a card that computes wrong is found in the step where it
    does.
    """
    mine = torch.tensor([number >> 32, number & 0xFFFFFFFF], device=device)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    with collective_errors():
        dist.all_gather(gathered, mine)
    return [rank for rank, each in enumerate(gathered) if not torch.equal(each, gathered[0])]


def all_reduce_tree(subtree: torch.Tensor, ranks: int) -> torch.Tensor:
    """The whole tree's sum on every rank, from each rank's subtree."""
    if ranks == 1:
        return subtree
    gathered = [torch.empty_like(subtree) for _ in range(ranks)]
    with collective_errors():
        dist.all_gather(gathered, subtree)
    tree = PairwiseSum()
    for each in gathered:
        tree.add(each)
    return tree.sum()
