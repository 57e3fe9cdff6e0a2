"""The gradient of a step as one fixed sum, so that any number of ranks gives the same bits.

Micro-batches are added in order within a lane, lanes in a balanced binary tree. Rank r of W owns the lanes
r·L/W … (r+1)·L/W − 1, which is a whole subtree (L and W are powers of two). A rank keeps one buffer per level of its
subtree, not one per lane. What the other ranks computed is gathered and added in pieces.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from kohaku_delta.errors import UserError
from kohaku_delta.training.rank_processes import LostRanksError

PIECE = 1 << 24  # numbers gathered at a time: 64 MiB from each rank


def lanes_of_rank(lanes: int, rank: int, ranks: int) -> range:
    """The lanes of a rank. Raises UserError if the ranks cannot share the lanes equally."""
    if lanes % ranks:
        raise UserError(
            f"{ranks} ranks cannot share {lanes} lanes: schedule.lanes must be a multiple of the number of ranks. "
            f"Use {lanes}, or a divisor of it."
        )
    share = lanes // ranks
    return range(rank * share, (rank + 1) * share)


class PairwiseSum:
    """Adds buffers pairwise, like a binary counter: after n = 2^k buffers the balanced tree's sum is left.

    Buffers are changed in place.
    """

    def __init__(self) -> None:
        self.levels: list[tuple[int, torch.Tensor]] = []

    def add(self, buffer: torch.Tensor) -> None:
        """Add the next buffer, flat float32, which belongs to this sum from now on."""
        level = 0
        while self.levels and self.levels[-1][0] == level:
            buffer = self.levels.pop()[1].add_(buffer)
            level += 1
        self.levels.append((level, buffer))

    def sum(self) -> torch.Tensor:
        """The sum of all buffers. Raises ValueError unless their number is a power of two."""
        ((_, total),) = self.levels
        return total


def gpu_is_full(error: Exception) -> bool:
    """Whether torch's allocator, or a library of CUDA that allocates past it, found no memory on the card."""
    words = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "'out of memory'")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)


@contextmanager
def collective_errors() -> Iterator[None]:
    """Turns the failure of a collective, because another rank is gone, into a LostRanksError."""
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more specific
        if gpu_is_full(error):  # NCCL allocates for itself
            raise
        raise LostRanksError(
            f"Rank {dist.get_rank()} lost the others ({str(error).split('. ')[0]}). Saved steps are kept; run the "
            "stage again to go on."
        ) from None


def all_reduce_tree(subtree: torch.Tensor, ranks: int) -> torch.Tensor:
    """The sum of the whole tree on every rank, from each rank's subtree; flat float32, changed in place."""
    if ranks == 1:
        return subtree
    for part in subtree.split(PIECE):
        gathered = torch.empty(ranks * len(part), dtype=part.dtype, device=part.device)
        with collective_errors():
            dist.all_gather_single(gathered, part)
        tree = PairwiseSum()
        for buffer in gathered.chunk(ranks):
            tree.add(buffer)
        part.copy_(tree.sum())
    return subtree
