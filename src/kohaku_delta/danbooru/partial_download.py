"""Downloads only the wanted members of tars, into sparse tars: every member is at the offset that it has in the whole
tar and agrees with the public index; the rest are holes.

So whatever is made from a sparse tar is, bit for bit, what would be made from the whole one. It is kept in the mirror
as selected/kind/owner/name/revision/file, apart from whole tars, with the index beside it under the tar's name
(data-0000.json), which the filter stage reads. Neighbouring members are downloaded as one range, with the gap between
them if it is small.
"""

import fcntl
import functools
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
from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, file_download, pins, progress, verified_files
from kohaku_delta.hub.client import RemoteFile
from kohaku_delta.hub.hub_errors import TransientError
from kohaku_delta.hub.pins import HubFile
from kohaku_delta.hub.verified_files import Stamp
from kohaku_delta.parallel import map_all, ordered_map
from kohaku_delta.params import Pin
from kohaku_delta.printing import log_above_bar

GAP = 1 << 18  # bytes; a smaller gap is downloaded rather than making another request
RANGE = 1 << 25  # bytes of one request, except for a larger member
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class PartialTar:
    """A tar of which only some members are wanted; arrays have one entry per member, by offset."""

    pin: Pin
    path: Path
    index: Path
    length: int  # in bytes
    sha256: str
    id: np.ndarray  # int64
    offset: np.ndarray  # int64
    size: np.ndarray  # int64
    digest: list[str]  # sha256

    @property
    def file(self) -> HubFile:
        return pins.hub_file(self.pin)

    def member_matches(self, descriptor: int, row: int) -> bool:
        """Whether a member is present, with the bytes that the index says."""
        data = tar_index.read_member_or_hole(descriptor, int(self.offset[row]), int(self.size[row]))
        return data is not None and hashlib.sha256(data).hexdigest() == self.digest[row]


def fetch_members(pinned: list[Pin], indexes: dict[str, Path], mirror: Path, ids) -> list[dict]:
    """Downloads the members of the posts `ids` into sparse tars; returns the entries of inputs.json, in the order of
    the pins. indexes: by name, data-0000 or original/data-0000; of several, the longest that ends the tar's path.

    Raises UserError for a tar without index, and for one whose pin is not the tar that the index describes.
    """
    wanted = unique_sorted(ids)
    tars = list(ordered_map(lambda pin: _partial_tar(pin, indexes, mirror, wanted), pinned))
    with progress.progress_bar("verify", sum(int(tar.size.sum()) for tar in tars)) as advance:
        checked = dict(zip(tars, ordered_map(lambda tar: _missing_rows(tar, advance), tars), strict=True))
    missing = {tar: rows for tar, (rows, _) in checked.items() if len(rows)}
    stamps = {tar: stamp for tar, (_, stamp) in checked.items()}
    if missing:
        remote = map_all(
            lambda tar, stop: client.retry(lambda: client.head_file(tar.file), tar.pin.url, stop), list(missing)
        )
        for tar in missing:
            indexed = Pin(url=tar.pin.url, bytes=tar.length, sha256=tar.sha256)
            file_download.check_pin_matches(indexed, remote[tar])
        total = sum(int(tar.size[rows].sum()) for tar, rows in missing.items())
        file_download.require_free_space(mirror, total)
        with progress.progress_bar("download", total) as advance:
            stamps |= map_all(
                lambda tar, stop: _fetch_rows(tar, missing[tar], remote[tar], stop, advance), list(missing)
            )
    return [
        {
            "path": str(tar.path),
            "bytes": tar.length,
            "sha256": tar.sha256,
            "url": tar.pin.url,
            "pinned": "members",
            "members": len(tar.id),
            "stamp": stamps[tar],
        }
        for tar in tars
    ]


def _partial_tar(pin: Pin, indexes: dict[str, Path], mirror: Path, wanted: np.ndarray) -> PartialTar:
    file = pins.hub_file(pin)
    parts = Path(file.file).with_suffix("").parts
    path = next((indexes[name] for at in range(len(parts)) if (name := "/".join(parts[at:])) in indexes), None)
    if path is None:
        raise UserError(
            f"{pin.url} has no index, so single members cannot be downloaded. "
            "Add it to download.inputs.index in params.yaml, or set download.images to all."
        )
    index = tar_index.read_public_index(path)
    if (
        not index.consistent
        or (pin.bytes or index.length) != index.length
        or not index.sha256.startswith(pin.sha256 or "")
    ):
        raise UserError(
            f"{path} is not the index of {pin.url}: it describes {index.length:,} bytes, "
            f"sha256 {index.sha256[:64]!a}. Correct the pins, or set download.images to all."
        )
    ids, rows = tar_index.first_row_per_id(index.name)
    is_wanted = positions_of(wanted, ids) >= 0
    ids, rows = ids[is_wanted], rows[is_wanted]
    order = np.argsort(index.offset[rows], kind="stable")
    ids, rows = ids[order], rows[order]
    digests = [index.digest[row] for row in rows.tolist()]
    if index.length <= 0 or not all(map(SHA256.fullmatch, [index.sha256, *digests])):
        raise UserError(
            f"{path} lacks the sha256 of its tar (hash_lfs), or of a member. "
            "Download it again, or set download.images to all."
        )
    target = mirror / "selected" / file.path
    return PartialTar(pin, target, path, index.length, index.sha256, ids, index.offset[rows], index.size[rows], digests)


def _missing_rows(tar: PartialTar, advance: Callable[[int], None]) -> tuple[np.ndarray, Stamp]:
    """The wanted rows that are missing or have wrong bytes, and the tar's stamp from before they were hashed. Creates
    the sparse tar, and links its index beside it.
    """
    tar.path.parent.mkdir(parents=True, exist_ok=True)
    index = tar.path.with_suffix(".json")
    if not index.is_symlink() or index.resolve() != tar.index.resolve():
        file_download.link(index, tar.index)
    if not tar.path.is_file() or tar.path.stat().st_size != tar.length:
        with open(tar.path, "ab") as file:
            file.truncate(tar.length)
    stamp, missing = verified_files.stamp(tar.path), []
    with open(tar.path, "rb", buffering=0) as file:
        for row in range(len(tar.id)):
            if not tar.member_matches(file.fileno(), row):
                missing.append(row)
            advance(int(tar.size[row]))
    return np.array(missing, np.int64), stamp


def _fetch_rows(
    tar: PartialTar, rows: np.ndarray, remote: RemoteFile, stop: threading.Event, advance: Callable[[int], None]
) -> Stamp:
    """Downloads these rows until all are right; returns the tar's stamp from before they were last hashed."""
    storage = remote.storage  # a signed address, which expires

    def copy(descriptor: int, first: int, last: int) -> None:
        nonlocal storage
        storage = storage or client.head_file(tar.file).storage
        try:
            client.copy_range(tar.file, descriptor, first, last, stop, storage=storage)
        except TransientError:
            storage = None
            raise

    with open(tar.path, "r+b", buffering=0) as file:
        descriptor = file.fileno()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{tar.path} is being written by another download. Wait for it, or stop it.") from None
        for _ in range(file_download.ATTEMPTS):
            for first, last in _merge_ranges(tar.offset[rows], tar.size[rows]):
                client.retry(functools.partial(copy, descriptor, first, last), tar.pin.url, stop)
                inside = (tar.offset[rows] >= first) & (tar.offset[rows] < last)
                advance(int(tar.size[rows[inside]].sum()))
            os.fsync(descriptor)
            stamp = verified_files.stamp(tar.path)
            wrong = [row for row in rows.tolist() if not tar.member_matches(descriptor, row)]
            if not wrong:
                return stamp
            rows = np.array(wrong, np.int64)
            advance(-int(tar.size[rows].sum()))
            log_above_bar(
                f"{tar.pin.url}: {len(rows):,} members arrived with other bytes than the index says; "
                "they are downloaded again"
            )
    raise UserError(
        f"{tar.pin.url}: post {tar.id[rows[0]]} arrived {file_download.ATTEMPTS} times with other bytes than its "
        "index says. Try again later, or set download.images to all."
    )


def _merge_ranges(offset: np.ndarray, size: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (first, last + 1) that cover members in ascending order."""
    first, last = 0, 0
    for begin, length in zip(offset.tolist(), size.tolist(), strict=True):
        if last > first and (begin > last + GAP or begin + length > first + RANGE):
            yield first, last
            last = first
        if last == first:
            first = last = begin
        last = max(last, begin + length)
    if last > first:
        yield first, last
