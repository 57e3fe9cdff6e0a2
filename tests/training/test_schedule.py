"""The order of training: every post once, the release's formula for B and the steps, lanes by place."""

import os
import subprocess
import sys
import time
from collections import Counter
from math import ceil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import load
from kohaku_delta.training import buckets, schedule

RELEASE = load("params.yaml").schedule


def posts(count, seed=0):
    numbers = np.random.default_rng(seed)
    return pa.table(
        {
            "post_id": np.sort(numbers.choice(10**7, count, False)),
            "width": numbers.integers(200, 4000, count),
            "height": numbers.integers(200, 4000, count),
        }
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_every_post_is_visited_once_an_epoch_with_its_own_counter(epochs):
    table = posts(5003)
    order, counts = schedule.build_schedule(table, RELEASE.model_copy(update={"epochs": epochs}))
    visits = [visit for row in order["visits"].to_pylist() for visit in row]
    assert sorted(visits) == list(range(epochs * 5003))
    ids = table["post_id"].to_pylist()
    assert [post for row in order["posts"].to_pylist() for post in row] == [ids[visit % 5003] for visit in visits]
    assert sum(count for _, count in counts) == 5003


def test_b_and_the_steps_follow_the_releases_formula():
    order, counts = schedule.build_schedule(posts(5003), RELEASE)
    b = sum(ceil(count / 4) for _, count in counts)

    def steps(b):  # micro-batches over two GPUs, 16 accumulated
        return ceil(ceil(b / 2) / 16)

    assert order.num_rows == b
    assert order["step"][-1].as_py() + 1 == steps(b)
    assert [steps(b) for b in (916_384, 916_385, 916_416, 916_417)] == [28_637, 28_638, 28_638, 28_639]


@pytest.mark.parametrize("max_steps", [1, 57, 58, 10**6])
def test_max_steps_keeps_the_first_steps_of_the_whole_schedule(max_steps):
    table = posts(5003)
    whole, counts = schedule.build_schedule(table, RELEASE)
    first, same_counts = schedule.build_schedule(table, RELEASE.model_copy(update={"max_steps": max_steps}))
    assert first.to_pylist() == [row for row in whole.to_pylist() if row["step"] < max_steps]
    assert same_counts == counts


def test_a_bucket_has_one_ragged_micro_batch_at_most_and_no_mixed_ones():
    table = posts(5003)
    sizes = dict(
        zip(
            table["post_id"].to_pylist(),
            zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True),
            strict=True,
        )
    )
    order, counts = schedule.build_schedule(table, RELEASE)
    ragged = Counter((row["width"], row["height"]) for row in order.to_pylist() if len(row["posts"]) < 4)
    assert all(number == 1 for number in ragged.values())
    assert {bucket for bucket, count in counts if count % 4} == set(ragged)
    for row in order.slice(0, 50).to_pylist():
        assert len({sizes[post][0] / sizes[post][1] > row["width"] / row["height"] * 4 for post in row["posts"]}) == 1


def test_steps_places_and_lanes_are_consecutive():
    order, _ = schedule.build_schedule(posts(3001), RELEASE)
    for number, row in enumerate(order.select(["step", "place", "lane"]).to_pylist()):
        assert row == {"step": number // 32, "place": number % 32, "lane": number % 32 % 8}


def test_the_order_depends_on_the_seed_only():
    table = posts(2000)
    assert schedule.build_schedule(table, RELEASE)[0].equals(schedule.build_schedule(table, RELEASE)[0])
    other = schedule.build_schedule(table, RELEASE.model_copy(update={"seed": 7}))[0]
    assert not schedule.build_schedule(table, RELEASE)[0].equals(other)


def test_bucket_lines_have_the_published_form():
    assert (
        schedule.bucket_lines([((256, 3328), 177), ((256, 3392), 20)])
        == "bucket 0: resolution (256, 3328), count: 177\nbucket 1: resolution (256, 3392), count: 20\n"
    )


def test_an_empty_selection_is_refused():
    with pytest.raises(UserError, match="no posts"):
        schedule.build_schedule(posts(0), RELEASE)


@pytest.mark.slow
def test_the_releases_whole_order_takes_under_a_minute_and_2_gib_and_has_its_steps(tmp_path):
    """3,665,398 posts of a million sizes, all 97 buckets populated: the release's 28,638 steps (or 28,637, as the
    ragged ends fall).
    """
    numbers = np.random.default_rng(0)
    ratio, area = (
        np.exp(numbers.normal(-0.25, 0.35, 3_665_398)),
        np.minimum(np.exp(numbers.normal(14.2, 0.9, 3_665_398)), 2048**2),
    )
    width, height = np.sqrt(area * ratio).astype(np.int64) + 1, np.sqrt(area / ratio).astype(np.int64) + 1
    rare = np.array(buckets.all_buckets(RELEASE)).repeat(9, axis=0)
    width[: len(rare)], height[: len(rare)] = rare.T
    ids = np.sort(numbers.choice(7_300_000, len(width), False))
    parquet.write(pa.table({"post_id": ids, "width": width, "height": height}), tmp_path / "build" / "posts.parquet")
    root, started = Path.cwd(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, root / "stages" / "schedule.py", "--params", root / "params.yaml"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert (
        process.returncode == 0
        and "3,665,398 images in 97 buckets" in output
        and ("28,638 steps" in output or "28,637 steps" in output)
    ), output
    assert time.monotonic() - started < 60 and used.ru_maxrss < 2 << 20
    written = (
        parquet.read(tmp_path / "build" / "schedule.parquet", ["posts"])["posts"].combine_chunks().flatten().to_numpy()
    )
    assert (np.sort(written) == ids).all()
