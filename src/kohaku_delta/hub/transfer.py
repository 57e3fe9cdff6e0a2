"""Invariant: a file appears at its place in the mirror in one step, after its bytes on the disk were hashed and agree with the pin and with the hub.

What has arrived lies beside that place as .name.mark.part, where mark begins the digest that the hub says the file has: after a kill, power cut or
broken connection the next run goes on from there, and never with the bytes of another file under the same name. Two processes never write
one part: it is locked.
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

from kohaku_delta.hub import remote, stamps, together
from kohaku_delta.hub.digest import hashed
from kohaku_delta.hub.pins import place
from kohaku_delta.hub.remote import Passing, Said, Stopped
from kohaku_delta.hub.stamps import Verified
from kohaku_delta.params import Pin
from kohaku_delta.refusal import Refusal

WRONG = 3  # times that a whole file may arrive with wrong bytes


def part(target: Path, said: Said) -> Path:
    return target.parent / f".{target.name}.{said.mark}.part"


def agree(pin: Pin, said: Said) -> None:
    """Refuses, before a byte is fetched, a file that the hub itself says to be another one than the pin."""
    if pin.bytes is not None and said.size != pin.bytes:
        raise Refusal(
            f"{pin.url}: the hub has {said.size:,} bytes there, the pin says {pin.bytes:,}. It is another file: mend the pin, or name a mirror (--mirror)."
        )
    if pin.sha256 is not None and said.sha256 is not None and not said.sha256.startswith(pin.sha256):
        raise Refusal(
            f"{pin.url}: the hub has the sha256 {said.sha256} there, the pin says {pin.sha256}. It is another file: mend the pin, or name a mirror (--mirror)."
        )


def bring(pin: Pin, target: Path, said: Said, stop: threading.Event, advance: Callable[[int], object]) -> Verified:
    """Fetches the file of a pin to `target`; returns its sha256 and stamp. `advance` hears of bytes that arrived (and, negative, of bytes that were thrown away)."""
    for _ in range(WRONG):
        with _locked(part(target, said)) as file:
            remote.patiently(functools.partial(_fill, pin, file, said, stop, advance), pin.url, stop)
            file.flush()
            os.fsync(file.fileno())
            found = hashed(part(target, said))
            if found.startswith(pin.sha256 or said.sha256 or "") and found == (said.sha256 or found) and _git(part(target, said), said):
                os.replace(part(target, said), target)
                _forget(target)
                return Verified(found, stamps.of(target))
            file.seek(0)
            file.truncate()
            advance(-said.size)
        together.tell(f"{pin.url}: {said.size:,} bytes arrived with the sha256 {found}, which is wrong; they were thrown away, and the file is fetched again")
        said = remote.patiently(lambda: remote.ask(place(pin)), pin.url, stop)
        agree(pin, said)
    raise Refusal(f"{pin.url} arrived {WRONG} times with other bytes than its sha256 says ({pin.sha256 or said.sha256 or said.git}). Try again later.")


def _fill(pin: Pin, file: BinaryIO, said: Said, stop: threading.Event, advance: Callable[[int], object]) -> None:
    """Goes on where the part ends, until it is as long as the hub says. Raises Passing."""
    have = file.seek(0, os.SEEK_END)
    if have < said.size:
        begun = have
        try:
            with remote.opened(place(pin), have) as (offset, pieces):
                if offset != have:
                    file.seek(offset)
                    file.truncate()
                    advance(offset - have)
                    have = begun = offset
                for piece in pieces:
                    if stop.is_set():
                        raise Stopped
                    if have + len(piece) > said.size:
                        raise Passing("sent more than the file has")
                    file.write(piece)
                    have += len(piece)
                    advance(len(piece))
        except Passing as fault:
            fault.gained = have - begun
            raise
        finally:
            file.flush()
        if have < said.size:
            raise Passing("ended the file early", gained=have - begun)
    elif have > said.size:
        file.truncate(said.size)


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # another process may have moved it to its place meanwhile
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise Refusal(f"{path} is being written by another download. Wait for it, or stop it.")
        yield file


def _git(path: Path, said: Said) -> bool:
    """Whether the file is what git's digest says, where the hub gave that one: git keeps sha1("blob <size>\\0" + bytes)."""
    return said.git is None or hashed(path, start=b"blob %d\0" % said.size, algorithm="sha1") == said.git


def _forget(target: Path) -> None:
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
