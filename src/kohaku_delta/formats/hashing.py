"""Digests of files and folders, always of the bytes that are on the disk now: sha256 for records, md5 for dvc.lock.

A folder's sha256 is that of the lines `sha256  path\n` of its files, sorted by path (as `sha256sum` lists them); its
md5 is DVC's `….dir`. Files that .dvcignore excludes from folders of code and inputs do not count.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map
from kohaku_delta.regular_files import open_regular

# See .dvcignore
EXCLUDED = re.compile(r"(^|/)(__pycache__|[^/]*\.egg-info|[^/]*\.members\.decoded)(/|$)|\.pyc$|\.members\.parquet$")
PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Digest:
    """Of a file or folder. md5 is "" if it was not asked for; `files`: sha256 of a folder's files by path, None for a
    file.
    """

    sha256: str
    md5: str
    bytes: int
    files: dict[str, str] | None = None


def hash_file(
    path: Path, advance: Callable[[int], object] | None = None, start: bytes = b"", algorithm: str = "sha256"
) -> str:
    """The digest of `start` + the file's bytes, in hex. `advance` is called with the number of bytes of each read."""
    digest = hashlib.new(algorithm, start)
    _feed(path, [digest], advance)
    return digest.hexdigest()


def digest_path(path: Path, md5: bool = True) -> Digest:
    """The digests of a file or folder; a link to a file counts as that file (`cache.type: symlink`). Raises UserError
    for a folder that contains links to folders, or special files.
    """
    return _digest_folder(path, md5) if path.is_dir() else _digest_file(path, md5)


def digest_paths(paths: Iterable[Path], md5: bool = True) -> list[Digest]:
    """The digests of every path, in order, on all processors."""
    return list(ordered_map(lambda path: digest_path(path, md5), paths))


def folder_digest(files: dict[str, str]) -> str:
    """The sha256 of a folder, from the sha256 of its files by path."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def _feed(path: Path, digests: list, advance: Callable[[int], object] | None = None) -> int:
    """Update every digest with the file's bytes, from one reading; return their number."""
    size = 0
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            for digest in digests:
                digest.update(piece)
            size += len(piece)
            if advance:
                advance(len(piece))
    return size


def _digest_file(path: Path, md5: bool) -> Digest:
    digests = [hashlib.sha256(), *([hashlib.md5(usedforsecurity=False)] if md5 else [])]
    size = _feed(path, digests)
    return Digest(digests[0].hexdigest(), digests[1].hexdigest() if md5 else "", size)


def _digest_folder(path: Path, md5: bool) -> Digest:
    found = {}
    for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix()):
        name = file.relative_to(path).as_posix()
        if EXCLUDED.search(name) or (file.is_dir() and not file.is_symlink()):
            continue
        if not file.is_file():
            raise UserError(
                f"{file} is not a regular file, nor a link to one: no stage writes it. Run its stage again."
            )
        found[name] = _digest_file(file, md5)
    listing = json.dumps([{"md5": each.md5, "relpath": name} for name, each in found.items()], sort_keys=True)
    files = {name: each.sha256 for name, each in found.items()}
    return Digest(
        folder_digest(files),
        hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir" if md5 else "",
        sum(each.bytes for each in found.values()),
        files,
    )
