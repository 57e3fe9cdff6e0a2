"""Invariant: the tags of any posts, grouped by post, each post's in the order of posttagrelation.id, in memory that does not grow with the table.

The table is read once, in its own order (a disk is never sought in). Rows of other posts are dropped; the rest goes to one temporary
file for every 65,536 posts, which has no name and so is gone with the process. Then each file is handed out as one chunk.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from kohaku_delta.danbooru.database import Database, Rank
from kohaku_delta.ordered import in_order

BITS = 16  # of a post's place in its chunk: numpy sorts 16 bits by radix


@dataclass(frozen=True)
class Chunk:
    """Posts `start` … `stop` of the given ids, and their pairs: post (uint16, place in the chunk), tag (int32, place among the tag ids)."""

    start: int
    stop: int
    post: np.ndarray
    tag: np.ndarray


def chunks(database: Database, ids: np.ndarray, tag_ids: np.ndarray, work: Callable, scratch=None) -> Iterator:
    """work(chunk) of the posts `ids` (int64, ascending, distinct), in order, every post in one chunk; `work` runs in threads.

    Pairs with a tag that is not in `tag_ids` are left out. `scratch` is the folder for the temporary files (8 bytes a pair).
    """
    posts, tags = Rank(ids), Rank(tag_ids)
    starts = range(0, len(ids), 1 << BITS)

    def wanted(pairs: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        place = posts(pairs >> 32)
        kept = np.flatnonzero(place >= 0)
        place, known = place[kept], tags(pairs[kept] & 0xFFFFFFFF)
        if (known < 0).any():
            place, known = place[known >= 0], known[known >= 0]
        number = (place >> BITS).astype(np.uint16)
        packed = (place & ((1 << BITS) - 1)).astype(np.int64) << 32 | known
        if len(number) and (number != number[0]).any():
            order = np.argsort(number, kind="stable")
            number, packed = number[order], packed[order]
        return len(pairs), number, packed

    def chunk(start: int) -> Chunk:
        file = files[start >> BITS]
        file.seek(0)
        packed = np.frombuffer(file.read(), np.int64)
        file.close()
        return work(Chunk(start, min(start + (1 << BITS), len(ids)), (packed >> 32).astype(np.uint16), packed.astype(np.int32)))

    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=1 << 18)) for _ in starts]
        with tqdm(total=database.last_relation(), desc="tags of posts", unit=" pairs", unit_scale=True, disable=None) as bar:
            for count, number, packed in database.relations(wanted):
                bar.update(count)
                cuts = np.flatnonzero(np.diff(number)) + 1
                for part, first in zip(np.split(packed, cuts), np.r_[0, cuts], strict=True):
                    if len(part):
                        files[number[first]].write(part)
        yield from tqdm(in_order(chunk, starts), total=len(starts), desc="captions", unit_scale=1 << BITS, unit=" posts", disable=None)
