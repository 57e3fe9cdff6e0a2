"""Invariant: a sparse tar has its members where the whole tar has them, and every one that was asked for agrees with
the public index; the rest are holes.

So what is made of it is, bit for bit, what would have been made of the whole tar: whoever reads a member finds the same
bytes at the same offset. It lies in the mirror as selected/kind/owner/name/revision/file, apart from whole tars, with
the index beside it under the tar's name (data-0000.json), which the filter stage believes. Neighbours are fetched by
one range, with the gap between them where that is small.
"""

import errno
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kohaku_delta.danbooru import tar_index
from kohaku_delta.danbooru.database import positions_of, unique_sorted
from kohaku_delta.danbooru.tar_index import read_member_or_hole
from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, concurrency, file_download, pins, verified_files
from kohaku_delta.hub.client import Cancelled, RemoteFile, TransientError
from kohaku_delta.hub.pins import HubFile
from kohaku_delta.hub.verified_files import Stamp
from kohaku_delta.parallel import ordered_map
from kohaku_delta.params import Pin

GAP = 1 << 18  # bytes that are rather fetched than asked around
RUN = 1 << 25  # bytes of one range, but for a larger member
WRONG = 3  # times that a member may arrive with wrong bytes
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class PartialTar:
    """A tar of which only some members are wanted; arrays have an entry for each of these, by offset."""

    pin: Pin
    path: Path
    index: Path
    length: int  # in bytes
    sha256: str
    id: np.ndarray  # int64
    offset: np.ndarray  # int64
    size: np.ndarray  # int64
    digest: np.ndarray  # (n, 32) uint8, sha256

    @property
    def place(self) -> HubFile:
        return pins.hub_file(self.pin)

    def member_matches(self, descriptor: int, row: int) -> bool:
        """Whether a member is there, with the bytes that the index says."""
        data = read_member_or_hole(descriptor, int(self.offset[row]), int(self.size[row]))
        return data is not None and hashlib.sha256(data).digest() == self.digest[row].tobytes()


def fetch_members(tars: list[Pin], indexes: dict[str, Path], mirror: Path, ids) -> list[dict]:
    """Fetches the members of the posts `ids` into sparse tars; returns the entries of inputs.json, in the order of the
    pins. indexes: by name, data-0000.

    Refuses a tar without index, and one whose pin is not the tar that the index describes.
    """
    wanted = unique_sorted(ids)
    files = list(ordered_map(lambda pin: _tar(pin, indexes, mirror, wanted), tars))
    with concurrency.progress_bar("verify", sum(int(file.size.sum()) for file in files)) as advance:
        looked = dict(zip(files, ordered_map(lambda file: _missing_rows(file, advance), files), strict=True))
    missing, verified = ({file: each[part] for file, each in looked.items()} for part in (0, 1))
    lacking = [file for file in files if len(missing[file])]
    if lacking:
        said = concurrency.map_concurrently(
            lambda file, stop: client.retry(lambda: client.head_file(file.place), file.pin.url, stop), lacking
        )
        for file in lacking:
            file_download.check_pin_matches(Pin(url=file.pin.url, bytes=file.length, sha256=file.sha256), said[file])
        total = sum(int(file.size[missing[file]].sum()) for file in lacking)
        concurrency.require_free_space(mirror, total)
        with concurrency.progress_bar("download", total) as advance:
            verified |= concurrency.map_concurrently(
                lambda file, stop: _fetch_rows(file, missing[file], said[file], stop, advance), lacking
            )
    return [
        {
            "path": str(file.path),
            "bytes": file.length,
            "sha256": file.sha256,
            "url": file.pin.url,
            "pinned": "members",
            "members": len(file.id),
            "stamp": verified[file],
        }
        for file in files
    ]


def _tar(pin: Pin, indexes: dict[str, Path], mirror: Path, wanted: np.ndarray) -> PartialTar:
    place = pins.hub_file(pin)
    index = indexes.get(Path(place.file).stem)
    if index is None:
        raise UserError(
            f"{pin.url} has no index, so single members cannot be fetched. Add it to download.inputs.index in params.yaml, or set download.images to all."
        )
    told = tar_index.read_public_index(index)
    if not told.consistent or (pin.bytes or told.length) != told.length or not told.sha256.startswith(pin.sha256 or ""):
        raise UserError(
            f"{index} is not the index of {pin.url}: it describes {told.length:,} bytes, sha256 {told.sha256[:64]!a}. Mend the pins, or set images to all."
        )
    ids, rows = tar_index.first_row_per_id(told.name)
    asked = positions_of(wanted, ids) >= 0
    order = np.argsort(told.offset[rows[asked]], kind="stable")
    ids, rows = ids[asked][order], rows[asked][order]
    digests = [told.digest[row] for row in rows.tolist()]
    if told.length <= 0 or not all(map(SHA256.fullmatch, [told.sha256, *digests])):
        raise UserError(
            f"{index} has no sha256 of its tar (hash_lfs), or of a member. Download it again, or set download.images to all."
        )
    digest = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
    return PartialTar(
        pin,
        mirror / "selected" / place.path,
        index,
        told.length,
        told.sha256,
        ids,
        told.offset[rows],
        told.size[rows],
        digest,
    )


def _missing_rows(file: PartialTar, advance: Callable[[int], None]) -> tuple[np.ndarray, Stamp]:
    """The wanted rows that are not there, or not with the right bytes; and the tar's stamp from before they were
    hashed. Makes the sparse tar, and puts its index beside it.
    """
    file.path.parent.mkdir(parents=True, exist_ok=True)
    beside = file.path.with_suffix(".json")
    if not beside.is_symlink() or beside.resolve() != file.index.resolve():
        file_download.link(beside, file.index)
    if not file.path.is_file() or file.path.stat().st_size != file.length:
        with open(file.path, "ab") as whole:
            whole.truncate(file.length)
    stamp, missing = verified_files.stamp(file.path), []
    with open(file.path, "rb", buffering=0) as whole:
        for row in range(len(file.id)):
            if not file.member_matches(whole.fileno(), row):
                missing.append(row)
            advance(int(file.size[row]))
    return np.array(missing, np.int64), stamp


def _fetch_rows(
    file: PartialTar, rows: np.ndarray, said: RemoteFile, stop: threading.Event, advance: Callable[[int], None]
) -> Stamp:
    """Fetches these rows, until all are right; returns the tar's stamp from before they were hashed the last time."""
    with open(file.path, "r+b", buffering=0) as whole:
        try:
            fcntl.flock(whole, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file.path} is being written by another download. Wait for it, or stop it.") from None
        source = RangeDownloader(file, said)
        for _ in range(WRONG):
            for first, last in _merge_ranges(file.offset[rows], file.size[rows]):
                client.retry(
                    lambda first=first, last=last: source.copy(whole.fileno(), first, last, stop), file.pin.url, stop
                )
                inside = (file.offset[rows] >= first) & (file.offset[rows] < last)
                advance(int(file.size[rows[inside]].sum()))
            os.fsync(whole.fileno())
            stamp = verified_files.stamp(file.path)
            wrong = np.array([row for row in rows.tolist() if not file.member_matches(whole.fileno(), row)], np.int64)
            if not len(wrong):
                return stamp
            advance(-int(file.size[wrong].sum()))
            concurrency.log_above_bar(
                f"{file.pin.url}: {len(wrong):,} members arrived with other bytes than the index says; they are fetched again"
            )
            rows = wrong
    raise UserError(
        f"{file.pin.url}: post {file.id[rows[0]]} arrived {WRONG} times with other bytes than its index says. Try again later, or set download.images to all."
    )


class RangeDownloader:
    """Where a tar's bytes come from: the signed address that the hub gave, asked for anew when it no longer works."""

    def __init__(self, file: PartialTar, said: RemoteFile):
        self.file, self.said = file, said

    def copy(self, descriptor: int, first: int, last: int, stop: threading.Event) -> None:
        """Bytes first … last - 1 of the tar to their place. Raises Passing."""
        self.said = self.said or client.head_file(self.file.place)
        position = first
        try:
            with client.open_range(self.file.place, first, last - 1, self.said.storage) as (offset, pieces):
                if offset != first:
                    raise TransientError("sends whole files only")
                for piece in pieces:
                    if stop.is_set():
                        raise Cancelled
                    if position + len(piece) > last:
                        raise TransientError("sent more than it was asked for")
                    written = os.pwrite(descriptor, piece, position)
                    if written < len(piece):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    position += written
            if position < last:
                raise TransientError("ended a range early")
        except TransientError as fault:
            self.said, fault.gained = None, position - first
            raise


def _merge_ranges(offset: np.ndarray, size: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (first, last + 1) that cover members in ascending order."""
    first = last = None
    for begin, length in zip(offset.tolist(), size.tolist(), strict=True):
        if first is None or begin > last + GAP or begin + length > first + RUN:
            if first is not None and last > first:
                yield first, last
            first, last = begin, begin
        last = max(last, begin + length)
    if first is not None and last > first:
        yield first, last
