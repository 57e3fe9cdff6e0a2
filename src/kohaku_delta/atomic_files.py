"""Invariant: a path either holds what was there before or the whole new content; never a part of it.

Everything is written aside in the same folder, flushed to the disk and renamed.
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
    """A file object whose content appears at `path` when the block ends well, and nowhere when it does not."""
    path = Path(path)
    aside = _temp_path(path)
    try:
        with open(aside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path):
    """The Path of an empty folder that takes the place of `path` when the block ends well."""
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
