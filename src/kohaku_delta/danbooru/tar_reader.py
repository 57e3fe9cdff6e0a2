"""Lists every regular file of a tar in order, or says what is wrong with the tar: no file is left out silently. Nothing
is ever extracted. Refused are also sparse files, which cannot be read in place, and anything but zeros behind the end.

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
HARD_LINK, FOLDER, SPARSE = b"1", b"5", b"S"
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes, whatever size their header gives
NO_FILES = (*NO_DATA, b"D", b"V")  # also GNU's lists of folders and names of volumes
PAX, PAX_SOLARIS, PAX_GLOBAL, LONG_NAME, LONG_LINK = EXTENSIONS = (b"x", b"X", b"g", b"L", b"K")
PAX_KEYS = {b"path": "name", b"linkpath": "target", b"size": "size"}
# Zeros that fill the last record, and the mark of two blocks before them: GNU tar, bsdtar and tarfile write records of
# 10,240 bytes; `tar -b 128` … `tar -b 2048` write longer ones
PADDING = 10_240 + BLOCK
LONG_RECORDS = [1 << bits for bits in range(16, 21)]
DOWNLOAD_AGAIN = "Download it again, and compare its size and sha256 with the source."
PACK_AGAIN = "Unpack it and pack the files again, as plain files (`tar --hard-dereference`, without `--sparse`)."


class TarError(Exception):
    """What is wrong with a tar, as the end of a sentence, and what to do."""

    def __init__(self, what: str, remedy: str = DOWNLOAD_AGAIN):
        super().__init__(f"{what}. {remedy}")


class TarEntry(NamedTuple):
    """A regular file of a tar."""

    name: bytes
    offset: int  # of its first byte
    size: int  # in bytes
    head: bytes  # its first HEAD bytes; fewer if the file is shorter


def list_tar(path) -> Iterator[TarEntry]:
    """Every regular file of the archive, in order; a hard link is the file that it names. Raises TarError, OSError."""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        if not end:
            raise TarError("is empty (0 bytes)")
        yield from _entries(file.fileno(), end)


def _entries(descriptor: int, end: int) -> Iterator[TarEntry]:
    position = 0
    extension: dict = {}  # from extension headers, about the member that follows: name, target, size, sparse
    awaits_member = False
    files: dict[bytes, TarEntry] = {}  # what hard links may name: the last file of each name so far
    while True:
        block = os.pread(descriptor, BLOCK + HEAD, position)
        header = _parse_header(block[:BLOCK], position, end)
        if header is None:
            if awaits_member:
                raise TarError(
                    f"is damaged: at byte {position:,} the member is missing that the header before describes"
                )
            _check_end(descriptor, position, end)
            return
        name, size, kind, target = header
        is_extension = kind in EXTENSIONS
        awaits_member = is_extension and (awaits_member or kind != PAX_GLOBAL)
        if extension and not is_extension:
            name, size, target = (
                extension.get("name", name),
                extension.get("size", size),
                extension.get("target", target),
            )
        if size < 0:
            raise TarError(f"is damaged: at byte {position:,} a member has a negative size")
        start, length = position + BLOCK, 0 if kind in NO_DATA else size
        if start + length > end:
            raise TarError(f"is truncated: it ends at byte {end:,} inside a member that reaches to {start + length:,}")
        if is_extension:
            if length > LONGEST:
                raise TarError(f"is damaged: at byte {start:,} an extension header claims {length:,} bytes")
            extension = _extension(kind, pread_fully(descriptor, start, length)) | extension
        else:
            if kind == SPARSE or "sparse" in extension:
                raise TarError(
                    f"holds {name[:200]!a} as a sparse file (at byte {position:,}), which cannot be read in place",
                    PACK_AGAIN,
                )
            if kind in FILES:
                files[name] = entry = TarEntry(name, start, length, block[BLOCK : BLOCK + length])
                yield entry
            elif kind == HARD_LINK:
                if target not in files:
                    raise TarError(
                        f"holds {name[:200]!a} as a hard link to {target[:200]!a} (at byte "
                        f"{position:,}), and no such file comes before it",
                        PACK_AGAIN,
                    )
                files[name] = files[target]._replace(name=name)
                yield files[name]
            elif kind not in NO_FILES:
                raise TarError(
                    f"holds {name[:200]!a} as a member of the type {kind!a} (at byte {position:,}), which is not known",
                    PACK_AGAIN,
                )
            extension = {}
        position = start + -(-length // BLOCK) * BLOCK


def _check_end(descriptor: int, position: int, end: int) -> None:
    """Raises TarError unless the empty block at `position` begins the zeros that end an archive."""
    rest = end - position
    longest = max([PADDING] + [record + BLOCK for record in LONG_RECORDS if end % record == 0])
    if rest > longest:
        what = f"has {rest:,} bytes behind it, where an archive has {longest:,} at most"
    elif pread_fully(descriptor, position, rest).strip(b"\0"):
        what = "has other bytes than zeros behind it"
    else:
        return
    raise TarError(
        f"is damaged, not filled, or several archives in one: at byte {position:,} there is an empty block, which ends "
        f"an archive, but it {what}",
        f"{DOWNLOAD_AGAIN} Archives that were joined must be packed again as one.",
    )


def _parse_header(block: bytes, position: int, end: int) -> tuple[bytes, int, bytes, bytes] | None:
    """(name, size, type, target of a hard link) of a member; None for the empty block that marks the end."""
    if len(block) == BLOCK and not block.strip(b"\0"):
        return None
    try:
        # the sum of all bytes, with the checksum's own field counted as spaces
        if len(block) == BLOCK and _number(block[148:156]) == sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
            name, kind = _text(block[:100]), block[156:157]
            if kind == b"\0" and name.endswith(b"/"):  # before POSIX
                kind = FOLDER
            if block[257:263] == b"ustar\0" and block[345]:  # a long name's first folders
                name = _text(block[345:500]) + b"/" + name
            return name, _number(block[124:136]), kind, _text(block[157:257]) if kind == HARD_LINK else b""
    except ValueError:
        pass
    if not position:
        raise TarError("is not a tar")
    if len(block) < BLOCK:
        raise TarError(f"is truncated: it ends at byte {end:,}, without the mark that ends an archive")
    raise TarError(f"is damaged: at byte {position:,} there is no member's header")


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int:
    """Octal digits, or a binary number if the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(_text(field).strip() or b"0", 8)


def _extension(kind: bytes, data: bytes) -> dict:
    """What an extension header says about the member that follows."""
    if kind == LONG_NAME:
        return {"name": _text(data)}
    if kind == LONG_LINK:
        return {"target": _text(data)}
    records = _pax_records(data)
    if kind == PAX_GLOBAL and records:
        raise TarError(f"gives all its members one {', '.join(records)} (in a global header)", PACK_AGAIN)
    return records


def _pax_records(data: bytes) -> dict:
    """What a pax extension header says of name, target and size: records "length key=value\\n"."""
    records: dict = {}
    at = 0
    while at < len(data) and data[at]:  # zeros pad the last block
        start = RECORD_LENGTH.match(data, at)
        length = int(start[1]) if start else 0
        if not start or not start.end() - at < length <= len(data) - at or data[at + length - 1 : at + length] != b"\n":
            raise TarError("is damaged: an extension header cannot be read")
        key, _, value = data[start.end() : at + length - 1].partition(b"=")
        if key in PAX_KEYS:
            records[PAX_KEYS[key]] = value
        elif key.startswith(b"GNU.sparse"):
            records["sparse"] = True
        at += length
    if "size" in records:
        if not re.fullmatch(rb"[0-9]{1,19}", records["size"]):
            raise TarError("is damaged: an extension header has a size that is not a number")
        records["size"] = int(records["size"])
    return records
