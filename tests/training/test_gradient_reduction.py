"""One sum whatever the number of ranks."""

import os
import subprocess
import sys

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


RANK = """
import sys
import torch.distributed as dist
from kohaku_delta.training import gradient_reduction
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
print(gradient_reduction.mismatching_ranks(2**64 - 1, 2, "cpu"), gradient_reduction.mismatching_ranks(2**64 - 1 - rank, 2, "cpu"), gradient_reduction.mismatching_ranks(rank << 40, 2, "cpu"))
"""


def test_a_rank_whose_number_is_another_is_named_on_every_rank(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": "src"},
        )
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in ranks] == ["[] [1] [1]"] * 2


def test_ranks_own_every_lane_once():
    assert [lane for rank in range(4) for lane in gradient_reduction.lanes_of_rank(8, rank, 4)] == list(range(8))


def test_ranks_that_do_not_divide_the_lanes_are_refused():
    with pytest.raises(UserError, match="3 ranks cannot share 8 lanes"):
        gradient_reduction.lanes_of_rank(8, 0, 3)
