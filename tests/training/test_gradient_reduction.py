"""One sum whatever the number of ranks."""

import pytest
import torch

from kohaku_delta.errors import UserError
from kohaku_delta.training import gradient_reduction


def tree(buffers):
    sums = gradient_reduction.PairwiseSum()
    for buffer in buffers:
        sums.add(buffer.clone())
    return sums.sum()


def halves(buffers):
    """The balanced tree by its definition."""
    if len(buffers) == 1:
        return buffers[0]
    middle = len(buffers) // 2
    return halves(buffers[:middle]) + halves(buffers[middle:])


def test_any_number_of_ranks_that_divides_the_lanes_gives_the_same_bits():
    generator = torch.Generator().manual_seed(3)
    buffers = [torch.randn(1000, generator=generator) * 10.0 ** (index % 5) for index in range(8)]
    whole = halves(buffers)
    for ranks in (1, 2, 4, 8):
        subtrees = [
            tree([buffers[lane] for lane in gradient_reduction.lanes_of_rank(8, rank, ranks)]) for rank in range(ranks)
        ]
        assert torch.equal(tree(subtrees), whole)
    assert not torch.equal(sum(buffers), whole), "the test's numbers must be such that order matters"


def test_ranks_own_every_lane_once():
    assert [lane for rank in range(4) for lane in gradient_reduction.lanes_of_rank(8, rank, 4)] == list(range(8))


def test_ranks_that_do_not_divide_the_lanes_are_refused():
    with pytest.raises(UserError, match="3 ranks cannot share 8 lanes"):
        gradient_reduction.lanes_of_rank(8, 0, 3)


def test_a_sum_gathered_in_pieces_is_the_sum_of_the_whole_tree(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    buffers = [torch.randn(1001, generator=generator) * 10.0 ** (index % 5) for index in range(4)]
    start, pieces = 0, []

    def all_gather(gathered, part):
        nonlocal start
        gathered.copy_(torch.cat([buffer[start : start + len(part)] for buffer in buffers]))
        start += len(part)
        pieces.append(len(part))

    monkeypatch.setattr(gradient_reduction, "PIECE", 300)
    monkeypatch.setattr(gradient_reduction.dist, "all_gather_single", all_gather)
    assert torch.equal(gradient_reduction.all_reduce_tree(buffers[2].clone(), 4), halves(buffers))
    assert pieces == [300, 300, 300, 101]
