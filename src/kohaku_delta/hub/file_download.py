"""Downloads single files. A file appears in the mirror in one step, after its bytes on the disk were hashed and agree
with the pin and with the Hub.

What has arrived is kept beside the target as .name.mark.part; mark is the start of the hash that the Hub gives for the
file. After a kill, power cut or broken connection the next run continues from there, and never with the bytes of
another file of the same name. A part is locked, so two processes never write to one.
"""

import fcntl
import functools
import glob
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.hub import client, verified_files
from kohaku_delta.hub.client import RemoteFile
from kohaku_delta.hub.pins import hub_file
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.params import Pin
from kohaku_delta.printing import log_above_bar

ATTEMPTS = 3  # that a whole file, or a member of a tar, may arrive with wrong bytes


def partial_path(target: Path, remote: RemoteFile) -> Path:
    return target.parent / f".{target.name}.{remote.mark}.part"


def check_pin_matches(pin: Pin, remote: RemoteFile) -> None:
    """Raises UserError, before a byte is downloaded, if the Hub has another file than the pin says."""
    difference = None
    if pin.bytes is not None and remote.size != pin.bytes:
        difference = f"{remote.size:,} bytes there, the pin says {pin.bytes:,}"
    elif pin.sha256 is not None and remote.sha256 is not None and not remote.sha256.startswith(pin.sha256):
        difference = f"the sha256 {remote.sha256} there, the pin says {pin.sha256}"
    if difference:
        raise UserError(
            f"{pin.url}: the hub has {difference}. It is another file: correct the pin, or name a mirror (--mirror)."
        )


def require_free_space(mirror: Path, needed: int) -> None:
    """Raises UserError if the disk of the mirror has no room for `needed` bytes."""
    existing = next(folder for folder in (mirror.absolute(), *mirror.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{needed:,} bytes are still to be downloaded into {mirror}, and {free:,} are free there. "
            "Free some space, or make it a link to a larger disk."
        )


def download_file(
    pin: Pin, target: Path, remote: RemoteFile, stop: threading.Event, advance: Callable[[int], object]
) -> VerifiedFile:
    """Downloads the file of a pin to `target`; returns its sha256 and stamp. `advance` is called with the number of
    bytes that arrived, and with a negative one if they are thrown away.
    """
    for _ in range(ATTEMPTS):
        part = partial_path(target, remote)
        with _locked(part) as descriptor:
            rest = functools.partial(_download_rest, pin, descriptor, remote, stop, advance)
            client.retry(rest, pin.url, stop)
            os.fsync(descriptor)
            found = hash_file(part)
            if (
                found.startswith(pin.sha256 or "")
                and found == (remote.sha256 or found)
                and (remote.git is None or _git_sha1(part, remote.size) == remote.git)
            ):
                os.replace(part, target)
                for stale in target.parent.glob(f".{glob.escape(target.name)}.*.part"):  # of older files of this name
                    stale.unlink(missing_ok=True)
                return VerifiedFile(found, verified_files.stamp(target))
            os.truncate(descriptor, 0)
            advance(-remote.size)
        log_above_bar(
            f"{pin.url}: {remote.size:,} bytes arrived with the wrong sha256 {found}; the file is downloaded again"
        )
        remote = client.retry(lambda: client.head_file(hub_file(pin)), pin.url, stop)
        check_pin_matches(pin, remote)
    raise UserError(
        f"{pin.url} arrived {ATTEMPTS} times with other bytes than its sha256 says "
        f"({pin.sha256 or remote.sha256 or remote.git}). Try again later."
    )


def _download_rest(
    pin: Pin, descriptor: int, remote: RemoteFile, stop: threading.Event, advance: Callable[[int], object]
) -> None:
    """Continues at the end of the part, up to the size that the Hub gives."""
    have = os.fstat(descriptor).st_size
    if have > remote.size:
        os.truncate(descriptor, remote.size)
    elif have < remote.size:
        client.copy_range(hub_file(pin), descriptor, have, remote.size, stop, advance)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the file, created if it does not exist, that no other process of ours writes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(descriptor), os.stat(path))  # another process may have moved it meanwhile
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise UserError(f"{path} is being written by another download. Wait for it, or stop it.")
        yield descriptor
    finally:
        os.close(descriptor)


def _git_sha1(path: Path, size: int) -> str:
    """git's hash of a file: sha1("blob <size>\\0" + bytes)."""
    return hash_file(path, start=b"blob %d\0" % size, algorithm="sha1")


def link(path: Path, target: Path) -> None:
    """Makes `path` a symbolic link to `target`, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / f".{path.name}.link"
    new.unlink(missing_ok=True)
    new.symlink_to(target.resolve())
    os.replace(new, path)
