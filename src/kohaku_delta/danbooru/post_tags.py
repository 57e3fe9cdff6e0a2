"""Invariant: the tags of any posts, grouped by post, each post's in the order of posttagrelation.id, in memory that
does not grow with the table.

The table is read once, in its own order (a disk is never sought in). Rows of other posts are dropped; the rest goes to
one temporary file for every eight chunks, which has no name and so is gone with the process. Then each file is handed
out chunk by chunk: few enough posts that what is made of them stays in a processor's cache.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from kohaku_delta.danbooru.database import Database, IdLookup
from kohaku_delta.parallel import ordered_map

BITS = 13  # of a post's place in its chunk: with three bits of a class, numpy sorts by radix
CHUNKS = 8  # of a file; a process may hold about a thousand files open


@dataclass(frozen=True)
class Chunk:
    """Posts `start` … `stop` of the given ids, and their pairs: post (uint16, place in the chunk), tag (int32, place
    among the tag ids).
    """

    start: int
    stop: int
    post: np.ndarray
    tag: np.ndarray


def chunks(database: Database, ids: np.ndarray, tag_ids: np.ndarray, work: Callable, scratch=None) -> Iterator:
    """work(chunk) of the posts `ids` (int64, ascending, distinct), in order, every post in one chunk; `work` runs in
    threads.

    Pairs with a tag that is not in `tag_ids` are left out. `scratch` is the folder for the temporary files (8 bytes a
    pair).
    """
    posts, tags = IdLookup(ids), IdLookup(tag_ids)
    starts = range(0, len(ids), 1 << BITS)

    def wanted(pairs: np.ndarray) -> tuple[int, list[tuple[int, np.ndarray]]]:
        """How many pairs were read, and those that are wanted, by chunk: place in the chunk << 32 | tag."""
        place = posts(pairs >> 32)
        kept = np.flatnonzero(place >= 0)
        place, known = place[kept], tags(pairs[kept] & 0xFFFFFFFF)
        if len(known) and known.min() < 0:
            place, known = place[known >= 0], known[known >= 0]
        number = (place >> BITS).astype(np.uint16)
        packed = (place & ((1 << BITS) - 1)).astype(np.int64) << 32 | known
        if (number[1:] < number[:-1]).any():
            order = np.argsort(number, kind="stable")
            number, packed = number[order], packed[order]
        cuts = [0, *(np.flatnonzero(number[1:] != number[:-1]) + 1).tolist(), len(number)]
        return len(pairs), [
            (int(number[first]), packed[first:last]) for first, last in zip(cuts, cuts[1:]) if last > first
        ]

    def read(first: int) -> list:
        file, order = files[first // CHUNKS], parts[first // CHUNKS]
        file.seek(0)
        packed, cuts = np.frombuffer(file.read(), np.int64), np.cumsum([0, *(length for _, length in order)])
        file.close()
        done = []
        for number in range(first, min(first + CHUNKS, len(starts))):
            pieces = [packed[cuts[place] : cuts[place + 1]] for place, (each, _) in enumerate(order) if each == number]
            own = np.concatenate([packed[:0], *pieces])
            start = starts[number]
            done.append(
                work(
                    Chunk(
                        start, min(start + (1 << BITS), len(ids)), (own >> 32).astype(np.uint16), own.astype(np.int32)
                    )
                )
            )
        return done

    firsts = range(0, len(starts), CHUNKS)
    parts: list[list[tuple[int, int]]] = [
        [] for _ in firsts
    ]  # of each file: (chunk, pairs) of what was written, in order
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=1 << 18)) for _ in firsts]
        with tqdm(
            total=database.last_relation(), desc="tags of posts", unit=" pairs", unit_scale=True, disable=None
        ) as bar:
            for count, found in database.relations(wanted):
                bar.update(count)
                for number, part in found:
                    files[number // CHUNKS].write(part)
                    parts[number // CHUNKS].append((number, len(part)))
        with tqdm(total=len(starts), desc="captions", unit_scale=1 << BITS, unit=" posts", disable=None) as bar:
            for done in ordered_map(read, firsts):
                bar.update(len(done))
                yield from done
