"""Invariant: what a tar lists is every regular file in it, in its order, or the tar is refused with what is wrong with
it.

Only headers are read, each together with the first bytes of its file (which say how large a webp picture is): one short
read a member, or one longer read for many small ones. Plain headers are followed, checked and cut in bulk; those of
long names, extensions and links are followed one by one. A tar that ends early or is no tar is `Damaged`: its posts
would otherwise be missing without a word.
"""

import os
from dataclasses import dataclass

import numpy as np

from kohaku_delta.danbooru.image import HEAD

BLOCK = 512
LOOK = BLOCK + HEAD
SMALL = 1 << 14  # bytes; behind a member smaller than this, one read hopes for several more
NEAR, FAR = (
    1 << 16,
    1 << 20,
)  # bytes of such a read: the first one, and the longest, as long as they hold what was hoped for
PAIRS = np.uint64(0x00FF00FF00FF00FF)  # every other byte of eight
FEW = 512  # headers that are checked and cut at once: they stay in a processor's cache
LONGEST = 1 << 20  # bytes of an extension header; real ones hold one name
FILES = (b"0", b"\0", b"7")  # regular files; type 7 is one that was laid out contiguously
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: a size in their header means nothing


class TarError(Exception):
    """What is wrong with a tar."""


@dataclass(frozen=True)
class TarEntries:
    """The regular files of a tar, in its order."""

    name: list[bytes]
    offset: np.ndarray  # int64, of a file's first byte
    size: np.ndarray  # int64, in bytes
    head: np.ndarray  # (n, HEAD) uint8, its first bytes, zeros behind a shorter file


def list_tar(path) -> TarEntries:
    """Every regular file of the archive. Raises Damaged."""
    parts: list[TarEntries] = []
    headers: list[bytes] = []
    positions, sizes, told_names = [], [], {}  # told_names: those that an extension header gave, by row
    with open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
        if not end:
            raise TarError("is empty (0 bytes)")
        try:
            for header, position, size, name in _members(descriptor, end):
                if name is not None:
                    told_names[len(positions)] = name
                headers.append(header)
                positions += position
                sizes += size
                if len(positions) >= FEW:
                    parts.append(_entries(headers, positions, sizes, told_names))
                    headers, positions, sizes, told_names = [], [], [], {}
        except TarError:
            _entries(headers, positions, sizes, told_names)  # what is wrong earlier is what misled the walk
            raise
    parts.append(_entries(headers, positions, sizes, told_names))
    return TarEntries(
        [name for part in parts for name in part.name],
        *(np.concatenate([getattr(part, each) for part in parts]) for each in ("offset", "size", "head")),
    )


def _entries(headers: list[bytes], positions: list[int], sizes: list[int], told_names: dict[int, bytes]) -> TarEntries:
    """The files of these headers, each of which has the head of its file behind it. Refuses headers whose checksum is
    wrong.
    """
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, LOOK)
    _require_checksums(blocks, positions)
    names = _names(blocks)
    for row, name in told_names.items():
        names[row] = name
    size = np.array(sizes, np.int64)
    head = np.where(np.arange(HEAD) < size[:, None], blocks[:, BLOCK:], np.uint8(0))
    return TarEntries(names, np.array(positions, np.int64) + BLOCK, size, head)


def _members(descriptor: int, end: int):
    """(headers and heads, their positions, sizes, told name or None) of one or more regular files; checks the sum of
    every header that is no plain file's.
    """
    pread, position, told = os.pread, 0, {}  # told: what extension headers said about the member that follows
    window, base, length, hope = b"", 0, 0, NEAR
    while True:
        header = window[position - base : position - base + LOOK]
        if len(header) < LOOK:
            window, base = pread(descriptor, hope if length < SMALL else LOOK, position), position
            if len(window) > LOOK and not told:
                rows, lengths, after = _headers_in(window, end - base)
                if len(rows):
                    yield _header_rows(window, rows), (rows + base).tolist(), lengths.tolist(), None
                    position, length, hope = base + after, int(lengths[-1]), min(2 * hope, FAR)
            header = window[position - base : position - base + LOOK]
            if len(header) < LOOK and position > base:
                continue
        kind = header[156:157]
        if kind == b"0" and not told:
            try:
                length = int(header[124:135], 8) if header[135:136] in b"\0 " else _number(header[124:136])
            except ValueError:
                length = _number(header[124:136])
            reach, hope = position + BLOCK + length, hope if length < SMALL else NEAR
            if length >= 0 and reach <= end and len(header) >= BLOCK:
                yield header.ljust(LOOK, b"\0"), [position], [length], None
                position += BLOCK + (length + BLOCK - 1) // BLOCK * BLOCK
                continue
        if len(header) < BLOCK:
            what = "is truncated" if position else "is not a tar"
            raise TarError(f"{what}: it ends at byte {end:,}, without the mark that ends an archive")
        header, whole = header[:BLOCK], header
        if not header.strip(b"\0"):
            return
        if not _checksum_ok(header):
            raise TarError(
                "is not a tar" if not position else f"is damaged: at byte {position:,} there is no member's header"
            )
        length = told.pop("size", None) if kind not in b"xgLK" else None
        length = _number(header[124:136]) if length is None else length
        start, placed = position + BLOCK, position
        position = start + (0 if kind in NO_DATA else -(-length // BLOCK) * BLOCK)
        if start + (0 if kind in NO_DATA else length) > end:
            raise TarError(f"is truncated: it ends at byte {end:,} inside a member that reaches to {start + length:,}")
        if kind in b"xL" and length > LONGEST:
            raise TarError(f"is damaged: at byte {start:,} an extension header claims {length:,} bytes")
        if kind == b"L":
            told["name"] = pread(descriptor, length, start).split(b"\0")[0]
        elif kind == b"x":
            told.update(_pax_records(pread(descriptor, length, start)))
        elif kind not in b"gK":
            if kind in FILES and "sparse" not in told:
                yield whole.ljust(LOOK, b"\0"), [placed], [length], told.get("name")
            told = {}


def _headers_in(window: bytes, end: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Positions and sizes of the plain files that follow one another from the window's start, and where what comes then
    begins. `end`: the archive's.
    """
    count = len(window) // BLOCK
    blocks = np.frombuffer(window, np.uint8, count * BLOCK).reshape(-1, BLOCK)
    closing = blocks[:, 135]
    block = np.flatnonzero(
        (blocks[:, 156] == ord("0")) & ((closing == 0) | (closing == ord(" ")))
    )  # what may be a plain file's header
    digits = blocks[block, 124:135] - np.uint8(ord("0"))
    size = np.zeros(count, np.int64)
    size[block] = digits @ (8 ** np.arange(10, -1, -1))
    start = block * BLOCK
    plain = (digits <= 7).all(axis=1) & (start + BLOCK + size[block] <= end) & (start + LOOK <= len(window))
    after = np.full(count, -1)
    after[block] = np.where(plain, block + 1 + (size[block] + BLOCK - 1) // BLOCK, -1)
    after = after.tolist()
    rows, block = [], 0
    while block < count and after[block] >= 0:
        rows.append(block)
        block = after[block]
    rows = np.array(rows, np.int64)
    return rows * BLOCK, size[rows], block * BLOCK


def _header_rows(window: bytes, starts: np.ndarray) -> bytes:
    """Header and head at each of these places."""
    return np.lib.stride_tricks.sliding_window_view(np.frombuffer(window, np.uint8), LOOK)[starts].tobytes()


def _require_checksums(blocks: np.ndarray, positions: list[int]) -> None:
    """Refuses headers whose checksum is wrong: the sum of their bytes, with its own field counted as spaces (old tars:
    as signed bytes).
    """
    digits = blocks[:, 148:154] - np.uint8(ord("0"))  # what is no digit wraps to 10 and more
    written = digits @ (8 ** np.arange(5, -1, -1))
    total = _sums(blocks[:, :BLOCK]) + 8 * ord(" ") - blocks[:, 148:156].sum(axis=1, dtype=np.int64)
    for row in np.flatnonzero((total != written) | (digits > 7).any(axis=1)).tolist():
        if not _checksum_ok(blocks[row, :BLOCK].tobytes()):
            place = positions[row]
            raise TarError(
                "is not a tar" if not place else f"is damaged: at byte {place:,} there is no member's header"
            )


def _sums(blocks: np.ndarray) -> np.ndarray:
    """The sum of each block's bytes (int64)."""
    words = np.ascontiguousarray(blocks).view(np.uint64)
    pairs = ((words & PAIRS) + (words >> np.uint64(8) & PAIRS)).sum(
        axis=1
    )  # four sums side by side, none of which reaches 2 to the power of 16
    return pairs.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)


def _names(blocks: np.ndarray) -> list[bytes]:
    """The members' names; ustar keeps a long one's first part in a second field."""
    names = np.ascontiguousarray(blocks[:, :100]).view("S100").reshape(-1).tolist()  # without the zeros at its end
    if b"\0" in b"".join(names):
        names = [name.split(b"\0")[0] for name in names]
    prefixed = (blocks[:, 257:263] == np.frombuffer(b"ustar\0", np.uint8)).all(axis=1) & (blocks[:, 345] > 0)
    for row in np.flatnonzero(prefixed).tolist():
        names[row] = blocks[row, 345:500].tobytes().split(b"\0")[0] + b"/" + names[row]
    return names


def _checksum_ok(header: bytes) -> bool:
    """Whether the header's checksum is right."""
    try:
        written = _number(header[148:156])
    except TarError:
        return False
    counted = header[:148] + header[156:]
    total = sum(counted) + 8 * 32
    return written == total or written == total - 256 * sum(byte > 127 for byte in counted)


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 when the first bit is set."""
    if field[:1] >= b"\x80":
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ") or b"0"
    if digits.strip(b"01234567"):
        raise TarError(f"is damaged: {field!r} is not a number of a member's header")
    return int(digits, 8)


def _pax_records(data: bytes) -> dict:
    """What a pax extension header says of name and size: records "length key=value\\n"."""
    told = {}
    while data.strip(b"\0"):
        length = data.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise TarError("is damaged: an extension header cannot be read")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            told["name"] = value
        elif key == b"size":
            told["size"] = int(value) if value.isdigit() else 0
        elif key.startswith(b"GNU.sparse"):
            told["sparse"] = True
        data = data[int(length) :]
    return told
