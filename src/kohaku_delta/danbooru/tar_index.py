"""Finds the files of posts in tars, and keeps an index of them, which is used only while the tars stay the same.

A member is (tar, offset, size): the first regular file named `<id>.<extension>`. Folders in front of a name, absolute
names and `..` do no harm, because nothing is ever extracted; links, devices, folders and other names are ignored. Tars
are read in parallel, once: the index is one parquet file beside their folder, if that can be written, and only tars
whose size or time changed are read again.

If a tar has its public index beside it (data-0000.json: offset, size and sha256 of each file), the members are those
listed there. The tar must have the length given there, and every member is hashed; one with another hash is not sound.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from kohaku_delta.danbooru import image, tar_reader
from kohaku_delta.danbooru.tar_reader import TarEntry
from kohaku_delta.danbooru.tars import pread_fully
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.parallel import ordered_map
from kohaku_delta.printing import print_line

NAME = re.compile(rb"(?s:.*/)?(?P<id>[0-9]{1,18})\.(?P<extension>[^./]+)")
READER = 2  # increased when other members are found in the same tar; an index made before is then made again
UNKNOWN = -1  # width and height of files other than WebP, whose headers are read later
SCHEMA = pa.schema(
    [
        ("tar", pa.string()),
        ("state", pa.string()),
        ("id", pa.int64()),
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
    + [("width", pa.int32()), ("height", pa.int32()), ("sound", pa.bool_())]
)


@dataclass(frozen=True)
class TarMembers:
    """The files of posts in one tar, ids ascending and distinct. All arrays have the same length."""

    id: np.ndarray  # int64
    extension: pa.StringArray  # lower case
    offset: np.ndarray  # int64, of the file's first byte
    size: np.ndarray  # int64, in bytes
    width: np.ndarray  # int32, pixels; 0 for an invalid WebP file, UNKNOWN for other formats
    height: np.ndarray  # int32
    sound: np.ndarray  # bool, false if the public index gives another sha256


def index_tars(files: dict[int, Path], index_path: Path | None, stop: Event | None = None) -> dict[int, TarMembers]:
    """The members of each tar, by its number. `index_path` is the file that the index is kept in (None: it is
    not kept). Once `stop` is set, no further tar is read.

    Raises UserError, with its name, for a tar that is truncated, empty, damaged, or not the one of its public index.
    """
    kept = _read_index(index_path) if index_path else {}  # by tar's name: (state, members)
    states = {number: f"{READER} {tar_state(path)}" for number, path in files.items()}
    found = {
        number: kept[path.name][1] for number, path in files.items() if kept.get(path.name, ("",))[0] == states[number]
    }
    missing = sorted(files.keys() - found.keys())
    if missing:
        total = sum(os.path.getsize(files[number]) for number in missing)
        wanted = (number for number in missing if stop is None or not stop.is_set())
        with tqdm(total=total, desc="index of the tars", unit="B", unit_scale=True, disable=None) as bar:
            try:
                for number, members in ordered_map(lambda number: (number, members_of(files[number])), wanted):
                    found[number] = members
                    bar.update(os.path.getsize(files[number]))
            finally:
                if index_path:
                    new = {files[number].name: (states[number], members) for number, members in found.items()}
                    _write_index(index_path, kept | new)
    return found


def decoded_folder(index: Path) -> Path:
    """Where the results of decoding are kept (dataset/image_decoding.py): beside the index of the tars."""
    return index.with_suffix(".decoded")


def default_index_path(files: dict[int, Path]) -> Path | None:
    """Where the index of these tars is kept: beside their folder (None if they are in several)."""
    folders = {path.parent for path in files.values()}
    return next(iter(folders)).resolve().with_suffix(".members.parquet") if len(folders) == 1 else None


def members_of(path) -> TarMembers:
    """The members of one tar, from its public index or from its own headers."""
    path = Path(path)
    if path.with_suffix(".json").is_file():
        return _public_members(path, path.with_suffix(".json"))
    try:
        return _first_members((entry, True) for entry in tar_reader.list_tar(path))
    except tar_reader.TarError as error:
        raise UserError(f"The tar {path} {error}") from None


def _first_members(entries: Iterable[tuple[TarEntry, bool]]) -> TarMembers:
    """The first file of each post among (file, whether it is sound)."""
    rows: dict[int, tuple] = {}
    for entry, sound in entries:
        name = NAME.fullmatch(entry.name)
        if name and (post := int(name["id"])) not in rows:
            width, height = image.webp_size(entry.head, entry.size) or (UNKNOWN, UNKNOWN)
            extension = name["extension"].decode("utf-8", "replace").lower()
            rows[post] = post, extension, entry.offset, entry.size, width, height, sound
    schema = pa.schema(list(SCHEMA)[2:])
    columns = zip(*sorted(rows.values()), strict=True) if rows else [()] * len(schema)
    return TarMembers(*_columns(pa.table(list(columns), schema=schema)))


def first_row_per_id(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int64, ascending and distinct) and the row of each one's first file among members of these names."""
    rows: dict[int, int] = {}
    for row, text in enumerate(names):
        if name := NAME.fullmatch(text.encode()):
            rows.setdefault(int(name["id"]), row)
    ids = sorted(rows)
    return np.array(ids, np.int64), np.array([rows[post] for post in ids], np.int64)


@dataclass(frozen=True)
class PublicTarIndex:
    """A tar as its public index lists it; lists and arrays have one entry per member."""

    length: int  # of the tar, in bytes
    sha256: str  # of the tar
    name: list[str]
    offset: np.ndarray  # int64
    size: np.ndarray  # int64
    digest: list[str]  # sha256 of each member

    @property
    def consistent(self) -> bool:
        """Whether every member lies inside the tar."""
        return not (
            (self.offset < 0) | (self.size < 0) | (self.size > self.length) | (self.offset > self.length - self.size)
        ).any()


def read_public_index(path: Path) -> PublicTarIndex:
    """The content of a public index. Raises UserError if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        length, sha256, entries = int(content["filesize"]), str(content.get("hash_lfs")), content["files"]
        offset, size = (
            np.array([int(entry[key]) for entry in entries.values()], np.int64) for key in ("offset", "size")
        )
        digest = [str(entry["sha256"]) for entry in entries.values()]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as the index of a tar ({type(error).__name__}: {error}). "
            "Download it again, or remove it."
        ) from None
    return PublicTarIndex(length, sha256, list(entries), offset, size, digest)


def _public_members(path: Path, index: Path) -> TarMembers:
    """Members as the public index lists them, each one's bytes compared with its sha256."""
    public, length = read_public_index(index), path.stat().st_size
    if length != public.length or not public.consistent:
        raise UserError(
            f"The tar {path} has {length:,} bytes, its index {index} says {public.length:,}. "
            "One of them is of another revision, or damaged: download both again."
        )
    entries: list = [None] * len(public.name)
    with open(path, "rb", buffering=0) as file:
        for row in np.argsort(public.offset, kind="stable").tolist():
            offset, size = int(public.offset[row]), int(public.size[row])
            data = read_member_or_hole(file.fileno(), offset, size)
            sound = data is not None and hashlib.sha256(data).hexdigest() == public.digest[row]
            head = (data or b"")[: image.HEAD]
            entries[row] = TarEntry(public.name[row].encode("utf-8", "replace"), offset, size, head), sound
    return _first_members(entries)


def read_member_or_hole(descriptor: int, offset: int, size: int) -> bytes | None:
    """A member's bytes; None, without reading, if it is in a hole of a sparse tar."""
    try:
        if os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + size > offset:
            return None
    except OSError as error:
        if error.errno == errno.ENXIO and size:  # nothing but a hole, up to the end
            return None
    return pread_fully(descriptor, offset, size)


def tar_state(path: Path) -> str:
    """Size and time of the tar, and of its public index if there is one: what is kept about a tar depends on them."""
    there = [each.stat() for each in (path, path.with_suffix(".json")) if each.is_file()]
    return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in there)


def _read_index(path: Path) -> dict[str, tuple[str, TarMembers]]:
    """The kept index, by the tar's name: its state and members; empty if there is none that can be read."""
    try:
        whole = parquet.read(path, SCHEMA.names).combine_chunks()
    except (UserError, OSError, pa.ArrowException):
        return {}
    if not whole.num_rows:
        return {}
    tar, state = (whole[name].combine_chunks().dictionary_encode() for name in ("tar", "state"))
    cuts = np.r_[0, np.flatnonzero(np.diff(tar.indices.to_numpy())) + 1, len(tar)].tolist()
    return {
        tar[start].as_py(): (state[start].as_py(), TarMembers(*_columns(whole.slice(start, stop - start))))
        for start, stop in zip(cuts, cuts[1:], strict=False)
    }


def _columns(part: pa.Table) -> Iterator:
    for name in SCHEMA.names[2:]:
        column = part[name].combine_chunks()
        yield column if name == "extension" else column.to_numpy(zero_copy_only=False)


def _write_index(path: Path, found: dict[str, tuple[str, TarMembers]]) -> None:
    """Keeps the index, if its folder can be written to."""
    try:
        with parquet.open_writer(path, SCHEMA) as append:
            for tar, (state, members) in sorted(found.items()):
                count = len(members.id)
                columns = (getattr(members, field.name) for field in fields(members))
                append(pa.table([pa.repeat(tar, count), pa.repeat(state, count), *columns], schema=SCHEMA))
    except OSError as error:
        print_line(
            f"The index of the tars cannot be kept at {path} ({error.strerror}): they will be read again next time. "
            "Choose another place with --index.",
            err=True,
        )
