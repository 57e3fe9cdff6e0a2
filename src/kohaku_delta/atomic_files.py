"""Files and folders that are replaced as a whole: a path holds either its old content or all of the new one.

The new content is written beside the path, as `.NAME.0.aside`, flushed to the disk and renamed. Its writer holds a lock
on it, which ends with the process, on whatever host: what a killed process left is used again by the next write of the
same path. While another process writes the same path, and on a file system without locks, the writer's process id
stands in place of the 0.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _create(path: Path, is_folder: bool) -> int:
    """A descriptor of the file or folder, which may exist."""
    if is_folder:
        path.mkdir(exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)


def _create_locked(path: Path, is_folder: bool) -> int | None:
    """The same, locked; None if another process writes it, or if there are no locks here."""
    descriptor = _create(path, is_folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):  # another process writes it, or has just renamed it
        pass
    except OSError:  # nobody can lock it, so nobody writes to it
        with suppress(OSError):
            path.rmdir() if is_folder else path.unlink()
    os.close(descriptor)
    return None


@contextmanager
def _aside(path: Path, is_folder: bool) -> Iterator[tuple[Path, int]]:
    """An empty file or folder beside `path`, and its descriptor. It replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.0.aside"
    descriptor = _create_locked(aside, is_folder)
    if descriptor is None:
        aside = path.parent / f".{path.name}.{os.getpid()}.aside"
        descriptor = _create(aside, is_folder)
    try:
        if is_folder:
            for old in aside.iterdir():
                _remove(old)
        else:
            os.ftruncate(descriptor, 0)
        yield aside, descriptor
        if is_folder and path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        _flush(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(aside)):  # not one that another process made meanwhile
                _remove(aside)
        raise
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path, mode: str = "wb"):
    """A file object for a with block. Its content appears at `path` if the block succeeds; otherwise nothing does."""
    binary = "b" in mode
    encoding, newline = (None, None) if binary else ("utf-8", "\n")
    with (
        _aside(Path(path), is_folder=False) as (_, descriptor),
        open(descriptor, mode, encoding=encoding, newline=newline, closefd=False) as file,
    ):
        yield file
        file.flush()
        os.fsync(descriptor)


@contextmanager
def atomic_dir(path):
    """The Path of an empty folder for a with block. The folder replaces `path` if the block succeeds."""
    with _aside(Path(path), is_folder=True) as (aside, _):
        yield aside
        for entry in [*sorted(aside.rglob("*")), aside]:
            if entry.is_file() or entry.is_dir():
                _flush(entry)


def clear_left_overs(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder that no other process writes to."""
    for path in folder.glob(".*.aside"):
        _remove(path)


@contextmanager
def scratch_dir(path):
    """The Path of an empty folder beside `path` for a with block, deleted at its end. What a process that was killed
    left there is deleted when the next one begins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.00.aside"  # a fixed name, in the form that the sandbox knows
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
