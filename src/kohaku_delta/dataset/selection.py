"""Draws the posts that the release drew: the same database and seed give the same posts.

The release called Python's `random.choices` on lists of posts: pick number i is `population[floor(random() * n)]`, with
replacement, and the ranges follow one another in one stream of MT19937. numpy continues the state of Python's
generator, so a million draws take milliseconds and give the same numbers.
"""

import random

import numpy as np
import pyarrow as pa

from kohaku_delta.danbooru.database import Database
from kohaku_delta.errors import UserError
from kohaku_delta.params import Selection

SCHEMA = pa.schema([("post_id", pa.int64()), ("drawn", pa.int32())])


def python_compatible_rng(seed: int) -> np.random.Generator:
    """A generator whose `.random()` are the numbers of `random.Random(seed).random()`, bit for bit."""
    *key, position = random.Random(seed).getstate()[1]
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": position}}
    return np.random.Generator(twister)


def sample_indices(numbers: np.random.Generator, population: int, count: int, replacement: bool) -> np.ndarray:
    """`count` indices (int64) below `population`, in the order in which they are drawn.

    With replacement: `random.choices`. Without: every index gets one number, and the `count` smallest numbers win (all,
    if there are fewer).
    """
    if replacement:
        return np.floor(numbers.random(count) * float(population)).astype(np.int64)
    return np.argsort(numbers.random(population), kind="stable")[:count]


def select(database: Database, parameters: Selection) -> pa.Table:
    """Each selected post once: post_id int64 ascending, drawn int32 (how often; 1 in a range with draw: all)."""
    ids = database.post_ids()
    numbers = python_compatible_rng(parameters.seed)
    drawn = np.zeros(len(ids), np.int64)
    for place, part in enumerate(parameters.ranges):
        start, stop = np.searchsorted(
            ids, [part.from_, part.below if part.below is not None else np.iinfo(np.int64).max]
        )
        if part.draw == "all":
            drawn[start:stop] += 1
        elif stop == start:
            span = f"{part.from_} <= id < {part.below}" if part.below is not None else f"id >= {part.from_}"
            raise UserError(
                f"The database {database.path} has no post with {span}, so selection.ranges.{place} can draw none. "
                "Remove that range, or name another database."
            )
        else:
            chosen = sample_indices(numbers, stop - start, part.draw, parameters.replacement)
            drawn[start:stop] += np.bincount(chosen, minlength=stop - start)
    taken = drawn > 0
    if not taken.any():
        raise UserError(f"selection.ranges selects no post of the database {database.path}.")
    return pa.table({"post_id": ids[taken], "drawn": drawn[taken].astype(np.int32)}, schema=SCHEMA)


def held_out(ids: np.ndarray, selected: np.ndarray, seed: int, count: int) -> np.ndarray:
    """`count` ids of posts that are not selected, ascending; all, if there are fewer. The preview measures on them."""
    rest = np.setdiff1d(ids, selected)
    keys = np.random.Philox(key=[seed, 0]).random_raw(len(rest))
    return np.sort(rest[np.argsort(keys, kind="stable")[:count]])
