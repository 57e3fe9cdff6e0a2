"""Guarantee: a file that was hashed once is used without being read again only while its size and both its times (of
its content, of its inode) stay the same.

A stamp is taken before the hashing begins, so an edit during or after it shows. Stamps lie beside inputs.json as
inputs.verified.json, which no stage depends on: times vary from host to host, and decide only whether a file is read
again, never what a stage writes.
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

TICK = 0.02  # s; Linux's file systems take their times from a clock that ticks every 1 to 10 ms


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file, following links. ctime_ns also changes if a tool puts the old mtime back."""

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
    """Hashes a file. Refuses one that is changed meanwhile."""
    before = stamp(path)
    if (
        0 <= (age := time.time() - before.ctime_ns / 1e9) < TICK
    ):  # an edit in the same tick of the clock would leave the same times
        time.sleep(TICK - age)
        before = stamp(path)
    sha256 = hash_file(path, advance)
    if stamp(path) != before:
        raise UserError(f"{path} was changed while it was hashed. Run this again when no other program writes it.")
    return VerifiedFile(sha256, before)


def read_stamps(listed: Path) -> dict[str, VerifiedFile]:
    """Path as in the list → what was verified of it; nothing if there are no stamps that can be read: then the files
    are hashed again.
    """
    try:
        content = json.loads(stamps_path(listed).read_text(encoding="utf-8"))
        return {
            path: VerifiedFile(each["sha256"], Stamp(each["bytes"], each["mtime_ns"], each["ctime_ns"]))
            for path, each in content.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_stamps(listed: Path, known: dict[str, VerifiedFile]) -> None:
    """Keeps stamps, if the folder can be written; without them the files are hashed again at their next use."""
    with suppress(OSError), atomic_files.atomic_write(stamps_path(listed), "w") as file:
        json.dump(
            {path: {"sha256": each.sha256, **asdict(each.stamp)} for path, each in known.items()},
            file,
            indent=1,
            sort_keys=True,
        )
        file.write("\n")


@contextmanager
def exclusive(listed: Path) -> Iterator[None]:
    """Waits for other processes that hash inputs of the same list, where the file system has locks."""
    with open(listed, "rb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
