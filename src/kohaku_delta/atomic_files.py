"""Files and folders that are replaced as a whole: a path holds either its old content or all of the new one.

The new content is written beside the path, flushed to the disk and renamed.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


def _temp_path(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{os.getpid()}.aside"


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path, mode: str = "wb"):
    """A file object for a with block. Its content appears at `path` if the block succeeds; otherwise nothing does."""
    path = Path(path)
    aside = _temp_path(path)
    try:
        binary = "b" in mode
        with open(aside, mode, encoding=None if binary else "utf-8", newline=None if binary else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path):
    """The Path of an empty folder for a with block. The folder replaces `path` if the block succeeds."""
    path = Path(path)
    aside = _temp_path(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in sorted(aside.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        _flush_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def scratch_dir(path):
    """The Path of an empty folder beside `path` for a with block, deleted at its end. What a process that was killed
    left there is deleted when the next one begins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.0.aside"  # a fixed name, in the form that the sandbox knows
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
