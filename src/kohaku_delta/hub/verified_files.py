"""Remembers which files were hashed. A file is used without hashing it again only if its size, modification time and
inode change time are still the same.

A stamp (size and times) is taken before the hashing begins, so an edit during or after it is noticed. Stamps are kept
beside inputs.json as inputs.verified.json. No stage depends on that file: times differ from host to host, and decide
only whether a file is read again, never what a stage writes.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.paths import stamps_path

TICK = 0.02  # seconds; Linux takes the times of files from a clock that ticks every 1 to 10 ms


@dataclass(frozen=True)
class Stamp:
    """Size and times of a file, following links. ctime_ns also changes if a tool restores the old mtime."""

    bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class VerifiedFile:
    """The sha256 of a file, and its stamp from before it was hashed."""

    sha256: str
    stamp: Stamp


def stamp(path: Path) -> Stamp:
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hash_with_stamp(path: Path, advance: Callable[[int], object] = lambda count: None) -> VerifiedFile:
    """Hashes a file. Raises UserError if it changes meanwhile. `advance` is called with the number of bytes read."""
    before = stamp(path)
    age = time.time() - before.ctime_ns / 1e9
    if 0 <= age < TICK:  # another edit in the same tick would leave the same times
        time.sleep(TICK - age)
        before = stamp(path)
    sha256 = hash_file(path, advance)
    if stamp(path) != before:
        raise UserError(f"{path} was changed while it was hashed. Run this again when no other program writes to it.")
    return VerifiedFile(sha256, before)


def read_stamps(manifest: Path) -> dict[str, VerifiedFile]:
    """What was verified, by the path in inputs.json. Empty if it cannot be read: then the files are hashed again."""
    try:
        content = json.loads(stamps_path(manifest).read_text(encoding="utf-8"))
        return {
            path: VerifiedFile(entry["sha256"], Stamp(entry["bytes"], entry["mtime_ns"], entry["ctime_ns"]))
            for path, entry in content.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_stamps(manifest: Path, known: dict[str, VerifiedFile]) -> None:
    """Keeps stamps, if the folder can be written to; without them the files are hashed again at their next use."""
    content = {path: {"sha256": file.sha256, **asdict(file.stamp)} for path, file in known.items()}
    with suppress(OSError), atomic_files.atomic_write(stamps_path(manifest), "w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")


@contextmanager
def exclusive(manifest: Path) -> Iterator[None]:
    """Waits for other processes that hash inputs of the same inputs.json, if the file system has locks."""
    with open(manifest, "rb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
