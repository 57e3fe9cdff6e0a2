"""Invariant: pairs cut out of a table's pages are those that SQLite gives for the same keys, bit for bit, or None: then
SQLite is asked.

posttagrelation has 35 rows a post, each of three whole numbers. SQLite hands them out one by one; numpy cuts them out
of the file's pages, a tenth of the time (SQLite's file format: https://www.sqlite.org/fileformat2.html). Only what
every row of a plain table is like is understood here: leaf cells of one page, the key as rowid, two whole numbers of at
most four bytes. Every page number, offset and length is checked before it is followed. The caller holds a lock on the
file and knows that the table's columns are the key and the two numbers.
"""

import os
from dataclasses import dataclass

import numpy as np

LEAF, INTERIOR = 13, 5
DEEPEST = 20  # levels of a table
SIZES = np.array(
    [0, 1, 2, 3, 4, 0, 0, 0, 0, 0], np.uint8
)  # bytes of a number, by its type in a row's header; 8 and 9 are the numbers 0 and 1
GOOD = np.isin(np.arange(256), [1, 2, 3, 4, 8, 9])
LONGEST = 16  # bytes of a cell
GOES_ON = np.uint64(0x80808080808080)  # bits of a key's bytes 0 … 6: another byte follows


@dataclass(frozen=True)
class LeafPages:
    """The leaf pages of a table in the order of its keys: leaf i holds keys above key[i - 1] up to key[i]; the last key
    is None.
    """

    descriptor: int
    size: int  # of a page
    usable: int  # bytes of a page that cells may lie in
    page: np.ndarray  # int64, from 0
    key: list


def list_leaf_pages(descriptor: int, root: int) -> LeafPages | None:
    """The leaves of the table whose root is page `root` (from 1). None where the file or the tree is not as plain as
    this module knows it.
    """
    head, length = os.pread(descriptor, 100, 0), os.fstat(descriptor).st_size
    if (
        len(head) < 100 or head[18:20] != b"\1\1" or head[21:24] != b"\x40\x20\x20"
    ):  # 1: all is in this file, no write-ahead log
        return None
    size = int.from_bytes(head[16:18], "big")
    size = 65536 if size == 1 else size
    usable, count = size - head[20], length // size
    if size < 512 or size & (size - 1) or usable < 480:
        return None
    level, keys, seen = [root], [None], 0
    for _ in range(DEEPEST):
        seen += len(level)
        if min(level) < 2 or max(level) > count or seen > count:
            return None
        kind = os.pread(descriptor, 1, (level[0] - 1) * size)
        if kind == bytes([LEAF]):
            return LeafPages(descriptor, size, usable, np.array(level, np.int64) - 1, keys)
        below, ends = [], []
        for number, key in zip(level, keys, strict=True):
            children = _children(os.pread(descriptor, size, (number - 1) * size), usable)
            if children is None:
                return None
            below += children[0]
            ends += [*children[1], key]
        level, keys = below, ends
    return None


def _children(page: bytes, usable: int) -> tuple[list[int], list[int]] | None:
    """The children of an interior page, and the last key of each but the last."""
    if page[:1] != bytes([INTERIOR]):
        return None
    cells = int.from_bytes(page[3:5], "big")
    if 12 + 2 * cells > usable:
        return None
    children, keys = [], []
    for start in np.frombuffer(page, ">u2", cells, 12).tolist():
        key, place = 0, start + 4
        while place < usable and page[place] > 127:
            key = key << 7 | page[place] & 127
            place += 1
        if place >= usable or place > start + 12:
            return None
        children.append(int.from_bytes(page[start : start + 4], "big"))
        keys.append(key << 7 | page[place])
    if keys != sorted(set(keys)):
        return None
    return [*children, int.from_bytes(page[8:12], "big")], keys


def count_rows(table: LeafPages, start: int, stop: int) -> int:
    """Rows of the leaves start … stop, as their headers say."""
    return sum(
        int.from_bytes(os.pread(table.descriptor, 2, page * table.size + 3), "big")
        for page in table.page[start:stop].tolist()
    )


def read_pairs(table: LeafPages, start: int, stop: int) -> np.ndarray | None:
    """first << 32 | second (int64) of every row of the leaves start … stop, in order; None where one of them is not
    plain.
    """
    page, size = table.page[start:stop], table.size
    whole = np.empty(len(page) * size + 3 * 8, np.uint8)
    whole[len(page) * size :] = 0
    view, cuts = memoryview(whole), np.flatnonzero(np.diff(page) != 1) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(page)], strict=True):
        if (
            os.preadv(table.descriptor, [view[first * size : last * size]], int(page[first]) * size)
            != (last - first) * size
        ):
            return None
    grid = whole[: len(page) * size].reshape(-1, size)
    cells = grid[:, 3].astype(np.int64) << 8 | grid[:, 4]
    most = int(cells.max())
    if (grid[:, 0] != LEAF).any() or not most or 8 + 2 * most > table.usable:
        return None
    pointers = np.ascontiguousarray(grid[:, 8 : 8 + 2 * most]).view(">u2")
    there = np.arange(most) < cells[:, None]
    inside = pointers[there].astype(np.int64)
    at = inside + np.repeat(np.arange(len(page)) * size, cells)
    if int(inside.min()) < 8 or int(inside.max()) >= table.usable:
        return None

    # the sixteen bytes from each cell's first, as two numbers whose low byte comes first
    words = whole.view("<u8")
    word, shift = at >> 3, (at & 7).astype(np.uint64) << np.uint64(3)
    back = np.uint64(64) - shift  # numpy shifts by 64 to zero
    middle = words.take(word + 1)
    low = words.take(word) >> shift | middle << back
    high = middle >> shift | words.take(word + 2) << back

    ends = ~(low >> np.uint64(8)) & GOES_ON
    key = (np.bitwise_count((ends & -ends) - np.uint64(1)) >> 3) + np.uint8(
        2
    )  # bytes in front of the row's header: its length and the key
    over = key.astype(np.uint64) << np.uint64(3)
    header = low >> over | high << (np.uint64(64) - over)  # its length, the types of key and numbers, then what follows
    first, second = (header >> np.uint64(16)).astype(np.uint8), (header >> np.uint64(24)).astype(np.uint8)
    if (header.astype(np.uint16) != 4).any() or not (GOOD[first] & GOOD[second]).all():
        return None
    one, two = SIZES[first], SIZES[second]
    length = one + two + np.uint8(4)
    if (length != low.astype(np.uint8)).any():
        return None
    length += key
    if int(length.max()) > LONGEST or (inside + length > table.usable).any():
        return None
    order = (low >> np.uint64(8)).byteswap() >> (np.uint64(72) - over)  # the key's own bytes: they ascend as keys do
    lower, upper = table.key[start - 1] if start else None, table.key[stop - 1]
    if not (order[1:] > order[:-1]).all() or not _between(
        lower, _key_from_sql(int(order[0])), _key_from_sql(int(order[-1])), upper
    ):
        return None
    values = (header >> np.uint64(32) | high >> over << np.uint64(32)).byteswap().view(np.int64)
    one, two = one.astype(np.int64) << 3, two.astype(np.int64) << 3
    left, right = values >> (64 - one), (values << one) >> (64 - two)
    for number, kind in ((left, first), (right, second)):
        constant = kind >= 8
        if constant.any():
            number[constant] = kind[constant] - 8
    return left << 32 | right


def _key_from_sql(written: int) -> int:
    """The key that is written as a varint of these bytes."""
    key = 0
    for byte in written.to_bytes(8, "big"):
        key = key << 7 | byte & 127
    return key


def _between(lower: int | None, first: int, last: int, upper: int | None) -> bool:
    return (lower is None or lower < first) and (upper is None or last <= upper)
