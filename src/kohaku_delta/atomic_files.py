"""Files and folders that are replaced as a whole: a path holds either its old content or all of the new one.

The new content is written beside the path, as `.NAME.0.aside`, flushed to the disk and renamed. Its writer holds a lock
on it, which ends with the process, on whatever host: what a killed process left is used again by the next write of the
same path. While another process writes the same path, and on a file system without locks, the writer's process id
stands in place of the 0. An old folder is renamed to `.NAME.000.aside` before the new one takes its place, and deleted
after that: a kill between the two renames leaves nothing at the path.

A path that a user mistyped costs nothing: a folder is replaced only if all of its files are of the kind that is written
there, and never the working folder or one around it.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kohaku_delta.errors import UserError


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


def refuse_other_files(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Raises UserError for a folder that must not be replaced: one that holds a file whose name (relative, with
    slashes) is not among the own ones, the working folder, and one around it.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder} is the folder in which this command runs, or one around it, and would be replaced as a whole. "
            "Name another folder."
        )
    for path in folder.rglob("*") if folder.is_dir() else []:
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not is_own(name):
            raise UserError(
                f"{folder} would be replaced as a whole, and holds {name}, which was not written by this command. "
                "Name another folder, or move that file away."
            )


def _require_kind(path: Path, is_folder: bool) -> None:
    """Raises OSError if a folder lies where a file is written, or the other way round."""
    if path.exists() and path.is_dir() != is_folder:
        number = errno.ENOTDIR if is_folder else errno.EISDIR
        raise OSError(number, os.strerror(number), str(path))


def _replace_folder(new: Path, path: Path) -> None:
    old = path.parent / f".{path.name}.000.aside"
    _remove(old)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    _remove(old)


@contextmanager
def _aside(path: Path, is_folder: bool) -> Iterator[tuple[Path, int]]:
    """An empty file or folder beside `path`, and its descriptor. It replaces `path` if the block succeeds."""
    _require_kind(path, is_folder)
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
            _replace_folder(aside, path)
        else:
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
def atomic_dir(path, is_own: Callable[[str], bool] = lambda name: True):
    """The Path of an empty folder for a with block. The folder replaces `path`, or what a link there leads to, if the
    block succeeds. is_own: see refuse_other_files; to be given wherever a user names the path.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    refuse_other_files(path, is_own)
    with _aside(path, is_folder=True) as (aside, _):
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
