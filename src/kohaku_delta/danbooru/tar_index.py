"""Invariant: what the index says of a tar is what that tar holds: an entry is believed only while size and time of its
files are the same.

A member is (tar, offset, size): the first regular file that is named `<id>.<ext>`. Folders in front of a name, absolute
names and `..` do no harm, because nothing is ever written; links, devices, folders and names that are no id are passed
over. Tars are read in parallel, once: the index is kept in one file beside their folder, where that can be written, and
only tars that changed are read again.

Where a tar has its public index beside it (data-0000.json: offset, size and sha256 of each file), the members are those
that it lists. The tar must be as long as it says, and every member's bytes are hashed; one with another hash is not
sound.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta.danbooru import image, tar_reader
from kohaku_delta.danbooru.tars import pread_fully
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.parallel import ordered_map

NAME = r"^(?:(?s:.*)/)?(?P<id>[0-9]{1,18})\.(?P<extension>[^./]+)$"
UNKNOWN = -1  # width and height of what is no webp: its own header says more
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
    """The files of one tar, ids ascending and distinct. All arrays have that length."""

    id: np.ndarray  # int64
    extension: pa.StringArray  # lower case
    offset: np.ndarray  # int64, of the file's first byte
    size: np.ndarray  # int64, in bytes
    width: np.ndarray  # int32, pixels; 0 for a webp that cannot be one, UNKNOWN for other formats
    height: np.ndarray  # int32
    sound: np.ndarray  # bool, false where the public index gives another sha256


def index_tars(files: dict[int, Path], keep=None, stop: Event | None = None) -> dict[int, TarMembers]:
    """The members of each tar, by its number. `keep` is the file that the index is kept in, None for nowhere. Once
    `stop` is set, no further tar is read.

    Refuses, with its name, a tar that is truncated, empty or not a tar, or that is not the one of its public index.
    """
    kept = _read_index(keep) if keep is not None else {}  # by tar's name: (state, members)
    states = {number: _tar_state(path) for number, path in files.items()}
    found = {
        number: kept[path.name][1] for number, path in files.items() if kept.get(path.name, ("",))[0] == states[number]
    }
    missing = sorted(files.keys() - found.keys())
    if missing:
        total = sum(os.path.getsize(files[number]) for number in missing)
        wanted = (number for number in missing if stop is None or not stop.is_set())
        with tqdm(total=total, desc="index of the tars", unit="B", unit_scale=True, disable=None) as bar:
            try:
                for number, members in zip(missing, ordered_map(lambda number: members_of(files[number]), wanted)):
                    found[number] = members
                    bar.update(os.path.getsize(files[number]))
            finally:
                if keep is not None:
                    _write_index(
                        keep,
                        kept | {files[number].name: (states[number], members) for number, members in found.items()},
                    )
    return found


def default_index_path(files: dict[int, Path]) -> Path | None:
    """Where the index of these tars is kept: beside the folder that they lie in (None when they lie in several)."""
    folders = {path.parent for path in files.values()}
    return next(iter(folders)).resolve().with_suffix(".members.parquet") if len(folders) == 1 else None


def members_of(path) -> TarMembers:
    """The members of one tar, from its public index or from its own headers."""
    path = Path(path)
    if path.with_suffix(".json").is_file():
        return _public_members(path, path.with_suffix(".json"))
    try:
        listing = tar_reader.list_tar(path)
    except tar_reader.TarError as error:
        raise UserError(
            f"The tar {path} {error}. Download it again, and compare its size and sha256 with the source."
        ) from None
    return _members(listing.name, listing.offset, listing.size, listing.head, np.ones(len(listing.name), bool))


def _members(
    name: list[bytes], offset: np.ndarray, size: np.ndarray, head: np.ndarray, sound: np.ndarray
) -> TarMembers:
    ids, row, extension = _first_per_id(name)
    extension = extension.take(pa.array(row)).dictionary_encode()
    words = pa.array(
        [text.decode("utf-8", "replace").lower() for text in extension.dictionary.to_pylist()], pa.string()
    )
    webp, width, height = image.webp_sizes(head[row], size[row])
    width, height = (np.where(webp, side, UNKNOWN).astype(np.int32) for side in (width, height))
    return TarMembers(ids, words.take(extension.indices), offset[row], size[row], width, height, sound[row])


def first_row_per_id(name: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int64, ascending and distinct) and the row of each one's first file among members of these names."""
    return _first_per_id([each.encode() for each in name])[:2]


def _first_per_id(name: list[bytes]) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """The same, and every row's extension (binary)."""
    names = pa.array(name, pa.binary())
    ids, extension = _parse_simple_names(names) or _parse_any_names(names)
    named = np.flatnonzero(ids >= 0)
    ids, first = np.unique(ids[named], return_index=True)
    return ids, named[first], extension


def _parse_any_names(names: pa.BinaryArray) -> tuple[np.ndarray, pa.Array]:
    """Ids (int64, -1 for a name that is none) and extensions (binary) of members' names."""
    parts = pc.extract_regex(names, NAME)
    ids, named = np.full(len(names), -1, np.int64), np.flatnonzero(parts.is_valid().to_numpy(zero_copy_only=False))
    ids[named] = pc.cast(parts.field(0).take(pa.array(named)).cast(pa.string()), pa.int64()).to_numpy()
    return ids, parts.field(1)


def _parse_simple_names(names: pa.BinaryArray) -> tuple[np.ndarray, pa.Array] | None:
    """The same where every name is digits, a dot and a short extension, as they are in all tars of danbooru2023; else
    None.
    """
    cuts = np.frombuffer(names.buffers()[1], np.int32, len(names) + 1)
    data = np.frombuffer(names.buffers()[2] or b"", np.uint8, cuts[-1])
    dots = np.flatnonzero(data == ord("."))
    if not len(names) or len(dots) != len(names) or (dots < cuts[:-1]).any() or (dots >= cuts[1:]).any():
        return None
    digits, letters = dots - cuts[:-1], cuts[1:] - dots - 1
    if not (digits.min() > 0 and digits.max() <= 18 and letters.min() > 0 and letters.max() <= 8):
        return None
    ids, word = np.zeros(len(names), np.int64), np.zeros(len(names), np.uint64)
    for place in range(int(digits.max())):
        there = place < digits
        digit = data.take(np.where(there, cuts[:-1] + place, dots)) - np.uint8(ord("0"))
        if (there & (digit > 9)).any():
            return None
        ids = np.where(there, ids * 10 + digit, ids)
    for place in range(int(letters.max())):
        there = place < letters
        word |= np.where(there, data.take(np.where(there, dots + 1 + place, dots)), np.uint8(0)).astype(
            np.uint64
        ) << np.uint64(8 * place)
    different, which = np.unique(word, return_inverse=True)
    extensions = [int(each).to_bytes(8, "little").rstrip(b"\0") for each in different]
    return (
        None
        if any(b"/" in each or b"\0" in each for each in extensions)
        else (ids, pa.array(extensions, pa.binary()).take(pa.array(which)))
    )


@dataclass(frozen=True)
class PublicTarIndex:
    """A tar as its public index lists it. All lists have a member's length."""

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
    """What a public index says. Refuses one that cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        length, sha256, entries = int(content["filesize"]), str(content.get("hash_lfs")), content["files"]
        offset, size = (
            np.array([int(entry[key]) for entry in entries.values()], np.int64) for key in ("offset", "size")
        )
        digest = [str(entry["sha256"]) for entry in entries.values()]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is not the index of a tar that can be read ({type(error).__name__}: {error}). Download it again, or remove it."
        ) from None
    return PublicTarIndex(length, sha256, list(entries), offset, size, digest)


def _public_members(path: Path, index: Path) -> TarMembers:
    """Members as the public index lists them, each one's bytes compared with its sha256."""
    told, there = read_public_index(index), path.stat().st_size
    if there != told.length or not told.consistent:
        what = f"The tar {path} has {there:,} bytes, its index {index} says {told.length:,}"
        raise UserError(f"{what}. One of them is of another revision, or damaged: download both again.")
    heads, sound = [], np.zeros(len(told.name), bool)
    with open(path, "rb", buffering=0) as file:
        for row in np.argsort(told.offset, kind="stable").tolist():
            data = read_member_or_hole(file.fileno(), int(told.offset[row]), int(told.size[row]))
            sound[row] = data is not None and hashlib.sha256(data).hexdigest() == told.digest[row]
            heads.append((row, (data or b"")[: image.HEAD].ljust(image.HEAD, b"\0")))
    head = np.frombuffer(b"".join(data for _, data in sorted(heads)), np.uint8).reshape(-1, image.HEAD)
    return _members([name.encode() for name in told.name], told.offset, told.size, head, sound)


def read_member_or_hole(descriptor: int, offset: int, size: int) -> bytes | None:
    """A member's bytes; None where it lies in a hole of a sparse tar, without reading it."""
    try:
        if os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + size > offset:
            return None
    except OSError as error:
        if error.errno == errno.ENXIO and size:  # nothing but a hole, up to the end
            return None
    return pread_fully(descriptor, offset, size)


def _tar_state(path: Path) -> str:
    """What a tar's entry is bound to: size and time of the tar, and of its public index where there is one."""
    there = [each.stat() for each in (path, path.with_suffix(".json")) if each.is_file()]
    return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in there)


def _read_index(keep) -> dict[str, tuple[str, TarMembers]]:
    """The kept index, by the tar's name: its state and members; nothing where there is no index that can be read."""
    try:
        whole = parquet.read(keep, SCHEMA.names).combine_chunks()
    except (UserError, OSError, pa.ArrowException):
        return {}
    if not whole.num_rows:
        return {}
    tar, state = (whole[name].combine_chunks().dictionary_encode() for name in ("tar", "state"))
    cuts = np.r_[0, np.flatnonzero(np.diff(tar.indices.to_numpy())) + 1, len(tar)].tolist()
    return {
        tar[start].as_py(): (state[start].as_py(), TarMembers(*_columns(whole.slice(start, stop - start))))
        for start, stop in zip(cuts, cuts[1:])
    }


def _columns(part: pa.Table) -> Iterator:
    for name in SCHEMA.names[2:]:
        column = part[name].combine_chunks()
        yield column if name == "extension" else column.to_numpy(zero_copy_only=name != "sound")


def _write_index(keep, found: dict[str, tuple[str, TarMembers]]) -> None:
    """Keeps the index, where that can be written."""
    try:
        with parquet.open_writer(keep, SCHEMA) as append:
            for tar, (state, members) in sorted(found.items()):
                fixed = [
                    pa.array([text], pa.string()).take(pa.array(np.zeros(len(members.id), np.int8)))
                    for text in (tar, state)
                ]
                append(
                    pa.table(
                        [
                            *fixed,
                            members.id,
                            members.extension,
                            members.offset,
                            members.size,
                            members.width,
                            members.height,
                            members.sound,
                        ],
                        schema=SCHEMA,
                    )
                )
    except OSError as error:
        click.echo(
            f"The index of the tars cannot be kept at {keep} ({error.strerror}): they will be read again. Name another place by --index.",
            err=True,
        )
