"""Invariant: a file appears at its place in the mirror in one step, after its bytes on the disk were hashed and agree
with the pin and with the hub.

What has arrived lies beside that place as .name.mark.part, where mark begins the digest that the hub says the file has:
after a kill, power cut or broken connection the next run goes on from there, and never with the bytes of another file
under the same name. Two processes never write one part: it is locked.
"""

import fcntl
import functools
import glob
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kohaku_delta.errors import UserError
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.hub import client, concurrency, verified_files
from kohaku_delta.hub.client import Cancelled, RemoteFile, TransientError
from kohaku_delta.hub.pins import hub_file
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.params import Pin

WRONG = 3  # times that a whole file may arrive with wrong bytes


def partial_path(target: Path, said: RemoteFile) -> Path:
    return target.parent / f".{target.name}.{said.mark}.part"


def check_pin_matches(pin: Pin, said: RemoteFile) -> None:
    """Refuses, before a byte is fetched, a file that the hub itself says to be another one than the pin."""
    if pin.bytes is not None and said.size != pin.bytes:
        raise UserError(
            f"{pin.url}: the hub has {said.size:,} bytes there, the pin says {pin.bytes:,}. It is another file: mend the pin, or name a mirror (--mirror)."
        )
    if pin.sha256 is not None and said.sha256 is not None and not said.sha256.startswith(pin.sha256):
        raise UserError(
            f"{pin.url}: the hub has the sha256 {said.sha256} there, the pin says {pin.sha256}. It is another file: mend the pin, or name a mirror (--mirror)."
        )


def download_file(
    pin: Pin, target: Path, said: RemoteFile, stop: threading.Event, advance: Callable[[int], object]
) -> VerifiedFile:
    """Fetches the file of a pin to `target`; returns its sha256 and stamp. `advance` hears of bytes that arrived (and,
    negative, of bytes that were thrown away).
    """
    for _ in range(WRONG):
        with _locked(partial_path(target, said)) as file:
            client.retry(functools.partial(_download_rest, pin, file, said, stop, advance), pin.url, stop)
            file.flush()
            os.fsync(file.fileno())
            found = hash_file(partial_path(target, said))
            if (
                found.startswith(pin.sha256 or said.sha256 or "")
                and found == (said.sha256 or found)
                and _matches_git_sha1(partial_path(target, said), said)
            ):
                os.replace(partial_path(target, said), target)
                _remove_stale_parts(target)
                return VerifiedFile(found, verified_files.stamp(target))
            file.seek(0)
            file.truncate()
            advance(-said.size)
        concurrency.log_above_bar(
            f"{pin.url}: {said.size:,} bytes arrived with the sha256 {found}, which is wrong; they were thrown away, and the file is fetched again"
        )
        said = client.retry(lambda: client.head_file(hub_file(pin)), pin.url, stop)
        check_pin_matches(pin, said)
    raise UserError(
        f"{pin.url} arrived {WRONG} times with other bytes than its sha256 says ({pin.sha256 or said.sha256 or said.git}). Try again later."
    )


def _download_rest(
    pin: Pin, file: BinaryIO, said: RemoteFile, stop: threading.Event, advance: Callable[[int], object]
) -> None:
    """Goes on where the part ends, until it is as long as the hub says. Raises Passing."""
    have = file.seek(0, os.SEEK_END)
    if have < said.size:
        begun = have
        try:
            with client.open_range(hub_file(pin), have) as (offset, pieces):
                if offset != have:
                    file.seek(offset)
                    file.truncate()
                    advance(offset - have)
                    have = begun = offset
                for piece in pieces:
                    if stop.is_set():
                        raise Cancelled
                    if have + len(piece) > said.size:
                        raise TransientError("sent more than the file has")
                    file.write(piece)
                    have += len(piece)
                    advance(len(piece))
        except TransientError as fault:
            fault.gained = have - begun
            raise
        finally:
            file.flush()
        if have < said.size:
            raise TransientError("ended the file early", gained=have - begun)
    elif have > said.size:
        file.truncate(said.size)


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(
                os.fstat(file.fileno()), os.stat(path)
            )  # another process may have moved it to its place meanwhile
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise UserError(f"{path} is being written by another download. Wait for it, or stop it.")
        yield file


def _matches_git_sha1(path: Path, said: RemoteFile) -> bool:
    """Whether the file is what git's digest says, where the hub gave that one: git keeps sha1("blob <size>\\0" +
    bytes).
    """
    return said.git is None or hash_file(path, start=b"blob %d\0" % said.size, algorithm="sha1") == said.git


def _remove_stale_parts(target: Path) -> None:
    """Removes parts of other files that once had this name."""
    for other in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        other.unlink(missing_ok=True)


def link(path: Path, target: Path) -> None:
    """Makes `path` a link to a file of another place, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.link"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.resolve())
    os.replace(aside, path)
