"""Groups the tags of any posts by post, in the order of posttagrelation.id, in memory that does not grow with the
table.

The table is read once, in its own order. Pairs of other posts are dropped; the rest is written to temporary files, one
for every eight chunks of posts. The files have no name, so they disappear with the process. Then each file is read and
processed chunk by chunk: a chunk is small enough to stay in a processor's cache.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from kohaku_delta.danbooru.database import Database, IdLookup
from kohaku_delta.parallel import ordered_map

BITS = 13  # of a post's position in its chunk: with the three bits of a tag's class, numpy sorts by radix
CHUNKS = 8  # per file; a process may have about a thousand files open


@dataclass(frozen=True)
class Chunk:
    """Posts `start` … `stop` - 1 of the ids, and their pairs: post (uint16, position in the chunk), tag (int32,
    position among the tag ids).
    """

    start: int
    stop: int
    post: np.ndarray
    tag: np.ndarray


def map_chunks(database: Database, ids: np.ndarray, tag_ids: np.ndarray, work: Callable, scratch=None) -> Iterator:
    """work(chunk) of the posts `ids` (int64, ascending, distinct), in order, every post in one chunk; `work` runs in
    threads.

    Pairs with a tag that is not in `tag_ids` are left out. `scratch` is the folder for the temporary files (8 bytes per
    pair). Raises UserError for ids that are not in database.POST_IDS and TAG_IDS.
    """
    database.require_small_ids("post", ids)
    database.require_small_ids("tag", tag_ids)
    post_position, tag_position = IdLookup(ids), IdLookup(tag_ids)
    starts = range(0, len(ids), 1 << BITS)

    def split(pairs: np.ndarray) -> tuple[int, list[tuple[int, np.ndarray]]]:
        """How many pairs were read, and those that are wanted, by chunk: position in the chunk << 32 | tag."""
        post, tag = post_position(pairs >> 32), tag_position(pairs & 0xFFFFFFFF)
        wanted = (post >= 0) & (tag >= 0)
        post, tag = post[wanted], tag[wanted]
        number = (post >> BITS).astype(np.uint16)
        packed = (post & ((1 << BITS) - 1)).astype(np.int64) << 32 | tag
        if (number[1:] < number[:-1]).any():
            order = np.argsort(number, kind="stable")
            number, packed = number[order], packed[order]
        cuts = np.flatnonzero(np.diff(number)) + 1
        firsts = number[np.append(0, cuts)].tolist() if len(number) else []
        return len(pairs), list(zip(firsts, np.split(packed, cuts), strict=False))

    def read(first: int) -> list:
        """work(chunk) of the chunks of one file."""
        file, parts = files[first // CHUNKS], written[first // CHUNKS]
        file.seek(0)
        pieces = np.split(np.frombuffer(file.read(), np.int64), np.cumsum([length for _, length in parts]))
        file.close()
        results = []
        for number in range(first, min(first + CHUNKS, len(starts))):
            own = [piece for piece, (chunk, _) in zip(pieces, parts, strict=False) if chunk == number]
            pairs = np.concatenate([np.empty(0, np.int64), *own])
            stop = min(starts[number] + (1 << BITS), len(ids))
            chunk = Chunk(starts[number], stop, (pairs >> 32).astype(np.uint16), pairs.astype(np.int32))
            results.append(work(chunk))
        return results

    firsts = range(0, len(starts), CHUNKS)
    written: list[list[tuple[int, int]]] = [[] for _ in firsts]  # per file: (chunk, number of pairs) in order
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=1 << 18)) for _ in firsts]
        total = database.last_relation()
        with tqdm(total=total, desc="tags of posts", unit=" pairs", unit_scale=True, disable=None) as bar:
            for count, parts in database.relations(split):
                bar.update(count)
                for number, pairs in parts:
                    files[number // CHUNKS].write(pairs)
                    written[number // CHUNKS].append((number, len(pairs)))
        with tqdm(total=len(starts), desc="captions", unit_scale=1 << BITS, unit=" posts", disable=None) as bar:
            for results in ordered_map(read, firsts):
                bar.update(len(results))
                yield from results
