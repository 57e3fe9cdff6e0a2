"""Lists every regular file of a tar in order, or says what is wrong with the tar. Nothing is ever extracted.

Only headers are read, each together with the first bytes of its file, which hold the size of a WebP image. Python's
tarfile would take three times as long, and is no help against damaged or hostile tars: it takes a damaged header for
the end of the archive, reads extension headers of any size and follows negative sizes backwards.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from kohaku_delta.danbooru.image import HEAD
from kohaku_delta.danbooru.tars import pread_fully

BLOCK = 512
LONGEST = 1 << 20  # bytes of an extension header; real ones hold one name
RECORD_LENGTH = re.compile(rb"([0-9]{1,7}) ")
# Types of members (POSIX pax and GNU)
FILES = (b"0", b"\0", b"7")  # regular files; 7 is one that was stored contiguously
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes, whatever size their header gives
PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK = b"x", b"g", b"L", b"K"  # extension headers


class TarError(Exception):
    """What is wrong with a tar, as the end of a sentence."""


class TarEntry(NamedTuple):
    """A regular file of a tar."""

    name: bytes
    offset: int  # of its first byte
    size: int  # in bytes
    head: bytes  # its first HEAD bytes; fewer if the file is shorter


def list_tar(path) -> Iterator[TarEntry]:
    """Every regular file of the archive, in order. Raises TarError, OSError."""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        if not end:
            raise TarError("is empty (0 bytes)")
        yield from _entries(file.fileno(), end)


def _entries(descriptor: int, end: int) -> Iterator[TarEntry]:
    position = 0
    extension: dict = {}  # from extension headers, about the member that follows: name, size, sparse
    while True:
        block = os.pread(descriptor, BLOCK + HEAD, position)
        header = _parse_header(block[:BLOCK], position, end)
        if header is None:
            return
        name, size, kind = header
        is_extension = kind in (PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK)
        if extension and not is_extension:
            name, size = extension.get("name", name), extension.get("size", size)
        if size < 0:
            raise TarError(f"is damaged: at byte {position:,} a member has a negative size")
        start, length = position + BLOCK, 0 if kind in NO_DATA else size
        if start + length > end:
            raise TarError(f"is truncated: it ends at byte {end:,} inside a member that reaches to {start + length:,}")
        position = start + -(-length // BLOCK) * BLOCK
        if kind in (PAX, LONG_NAME):
            if length > LONGEST:
                raise TarError(f"is damaged: at byte {start:,} an extension header claims {length:,} bytes")
            data = pread_fully(descriptor, start, length)
            extension |= _pax_records(data) if kind == PAX else {"name": data.split(b"\0")[0]}
        elif not is_extension:
            if kind in FILES and "sparse" not in extension:
                yield TarEntry(name, start, size, block[BLOCK : BLOCK + size])
            extension = {}


def _parse_header(block: bytes, position: int, end: int) -> tuple[bytes, int, bytes] | None:
    """(name, size, type) of a member; None for the empty block that marks the end of the archive.

    A long name's first folders are in another field (ustar's prefix), which nothing here needs.
    """
    if len(block) == BLOCK and not block.strip(b"\0"):
        return None
    try:
        # the sum of all bytes, with the checksum's own field counted as spaces
        if len(block) == BLOCK and _number(block[148:156]) == sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
            return block[:100].partition(b"\0")[0], _number(block[124:136]), block[156:157]
    except ValueError:
        pass
    if not position:
        raise TarError("is not a tar")
    if len(block) < BLOCK:
        raise TarError(f"is truncated: it ends at byte {end:,}, without the mark that ends an archive")
    raise TarError(f"is damaged: at byte {position:,} there is no member's header")


def _number(field: bytes) -> int:
    """Octal digits, or a binary number if the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _pax_records(data: bytes) -> dict:
    """What a pax extension header says of name and size: records "length key=value\\n"."""
    records: dict = {}
    at = 0
    while at < len(data) and data[at]:  # zeros pad the last block
        start = RECORD_LENGTH.match(data, at)
        length = int(start[1]) if start else 0
        if not start or not start.end() - at < length <= len(data) - at:
            raise TarError("is damaged: an extension header cannot be read")
        key, _, value = data[start.end() : at + length - 1].partition(b"=")
        if key == b"path":
            records["name"] = value
        elif key == b"size":
            records["size"] = int(value[:20]) if value.isdigit() else 0
        elif key.startswith(b"GNU.sparse"):
            records["sparse"] = True
        at += length
    return records
