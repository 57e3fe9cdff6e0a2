"""Lists every regular file of a tar in order, or says what is wrong with the tar. Nothing is ever extracted.

Python's tarfile parses each header and compares its checksum. The walk from header to header is here, because
tarfile's own takes a damaged header for the end of the archive, reads extension headers of any size and follows
negative sizes backwards. Only headers are read, each together with the first bytes of its file, which hold the size of
a WebP image.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from kohaku_delta.danbooru.image import HEAD
from kohaku_delta.danbooru.tars import pread_fully

BLOCK = tarfile.BLOCKSIZE
LONGEST = 1 << 20  # bytes of an extension header; real ones hold one name
RECORD_LENGTH = re.compile(rb"([0-9]{1,7}) ")
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
NO_DATA = b"123456"  # links, devices, folders and pipes have no data, whatever size their header gives


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
        kind, start = header.type, position + BLOCK
        is_extension = kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        size = header.size if is_extension else extension.get("size", header.size)
        if size < 0:
            raise TarError(f"is damaged: at byte {position:,} a member has a negative size")
        length = 0 if kind in NO_DATA else size
        if start + length > end:
            raise TarError(f"is truncated: it ends at byte {end:,} inside a member that reaches to {start + length:,}")
        position = start + -(-length // BLOCK) * BLOCK
        if kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if length > LONGEST:
                raise TarError(f"is damaged: at byte {start:,} an extension header claims {length:,} bytes")
            data = pread_fully(descriptor, start, length)
            extension |= _pax_records(data) if kind == tarfile.XHDTYPE else {"name": data.split(b"\0")[0]}
        elif not is_extension:
            if kind in FILES and "sparse" not in extension:
                name = extension.get("name", header.name.encode("utf-8", "surrogateescape"))
                yield TarEntry(name, start, size, block[BLOCK : BLOCK + size])
            extension = {}


def _parse_header(block: bytes, position: int, end: int) -> tarfile.TarInfo | None:
    """The header; None for the empty block that marks the end of the archive."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return None
    except tarfile.HeaderError:
        if not position:
            raise TarError("is not a tar") from None
        if len(block) < BLOCK:
            raise TarError(f"is truncated: it ends at byte {end:,}, without the mark that ends an archive") from None
        raise TarError(f"is damaged: at byte {position:,} there is no member's header") from None


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
