"""Invariant: a path's digests are those of its bytes: sha256 as the records say it, md5 as DVC's lock says it, from one
reading.

A folder's sha256 is that of the lines `sha256  place\n` of its files, in order of their places (what `sha256sum` would
list); its md5 is DVC's `….dir`. Neither counts what .dvcignore leaves out of folders of code and of inputs.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map

LEFT_BESIDE = re.compile(r"(^|/)(__pycache__|[^/]*\.egg-info)(/|$)|\.pyc$|\.members\.parquet$")  # as .dvcignore says
PIECE = 8 << 20  # read at a time; smaller files take no thread


@dataclass(frozen=True)
class Digest:
    """Of a file or a folder. `files`: sha256 of each file of a folder by its place in it; None for a file. md5 is ""
    where it was not asked for.
    """

    sha256: str
    md5: str
    bytes: int
    files: dict[str, str] | None = None


def digest_path(path: Path, md5: bool = True) -> Digest:
    """The digests of what lies at `path`. Refuses what is neither a file nor a folder of files."""
    return _folder(path, md5) if path.is_dir() else _file(path, md5)


def digest_paths(paths: Iterable[Path], md5: bool = True) -> list[Digest]:
    """The digests of every path, in order, on all processors."""
    return list(ordered_map(lambda path: digest_path(path, md5), paths))


def _file(path: Path, md5: bool) -> Digest:
    hashes = [hashlib.sha256()] + ([hashlib.md5(usedforsecurity=False)] if md5 else [])
    size = 0
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size <= PIECE:
            data = file.read()
            size = len(data)
            for each_hash in hashes:
                each_hash.update(data)
        else:
            size = _large(file, hashes)
    return Digest(hashes[0].hexdigest(), hashes[1].hexdigest() if md5 else "", size)


def _large(file, hashes: list) -> int:
    """Two pieces in turn: one is read while a thread for each hash takes the other in."""
    size, busy = 0, []
    with ThreadPoolExecutor(len(hashes)) as pool:
        buffers = [memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE))]
        turn = 0
        while count := file.readinto(buffers[turn]):
            wait(busy)
            busy = [pool.submit(each_hash.update, buffers[turn][:count]) for each_hash in hashes]
            size, turn = size + count, 1 - turn
        wait(busy)
    return size


def _folder(path: Path, md5: bool) -> Digest:
    files = sorted(
        (each for each in path.rglob("*") if each.is_symlink() or not each.is_dir()),
        key=lambda each: each.relative_to(path).as_posix(),
    )
    files = [file for file in files if not LEFT_BESIDE.search(file.relative_to(path).as_posix())]
    for file in files:
        if file.is_symlink() or not file.is_file():
            raise UserError(
                f"{file} is a link or no plain file, which no stage writes. Delete {path} and run its stage again."
            )
    places = [file.relative_to(path).as_posix() for file in files]
    found = [_file(file, md5) for file in files]
    listed = json.dumps(
        [{"md5": digest.md5, "relpath": place} for place, digest in zip(places, found)], sort_keys=True
    )  # DVC's own form
    hashes = {place: digest.sha256 for place, digest in zip(places, found)}
    return Digest(
        folder_digest(hashes),
        hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir" if md5 else "",
        sum(digest.bytes for digest in found),
        hashes,
    )


def folder_digest(files: dict[str, str]) -> str:
    """The sha256 of a folder whose files have these."""
    return hashlib.sha256("".join(f"{files[place]}  {place}\n" for place in sorted(files)).encode()).hexdigest()
