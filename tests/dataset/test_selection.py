import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danbooru_factory import choose, write_database
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import selection
from kohaku_delta.errors import UserError
from kohaku_delta.params import Range, Selection

RELEASE = [(5_000_000, None, "all"), (3_000_000, 5_000_000, 1_000_000), (0, 3_000_000, 1_000_000)]


def parameters(ranges, seed=1, replacement=True):
    return Selection(
        seed=seed,
        replacement=replacement,
        ranges=[Range(**{"from": start, "below": below, "draw": draw}) for start, below, draw in ranges],
    )


def test_the_release_draws_787041_and_850496_distinct_posts_of_full_ranges():
    numbers = selection.python_compatible_rng(1)
    middle = selection.sample_indices(numbers, 2_000_000, 1_000_000, replacement=True)
    low = selection.sample_indices(numbers, 2_999_999, 1_000_000, replacement=True)
    assert middle[:3].tolist() == [268728, 1694867, 1527549]
    assert low[:3].tolist() == [1385288, 2023284, 322769]
    assert (len(np.unique(middle)), len(np.unique(low))) == (787_041, 850_496)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64),
    ids=st.sets(st.integers(1, 60), min_size=1),
    edge=st.integers(2, 60),
    low=st.integers(1, 90),
    high=st.integers(1, 90),
)
def test_posts_are_those_of_random_choices(tmp_path_factory, seed, ids, edge, low, high):
    ranges = [(50, None, "all"), (edge, 61, high), (0, edge, low)]
    path = write_database(tmp_path_factory.mktemp("db") / "a.db", [{"id": post} for post in ids])
    try:
        expected = choose(ids, seed, ranges)
    except IndexError:  # choices from nothing
        with pytest.raises(UserError, match="has no post with"):
            selection.select(Database(path), parameters(ranges, seed))
        return
    table = selection.select(Database(path), parameters(ranges, seed))
    assert table["post_id"].to_pylist() == sorted(expected)
    assert table["drawn"].to_pylist() == [expected[post] for post in sorted(expected)]


def test_without_replacement_no_post_is_drawn_twice(tmp_path):
    path = write_database(tmp_path / "a.db", [{"id": post} for post in range(1, 401)])
    table = selection.select(Database(path), parameters([(0, 300, 150), (300, None, 500)], replacement=False))
    assert set(table["drawn"].to_pylist()) == {1}
    assert table.num_rows == 150 + 101
