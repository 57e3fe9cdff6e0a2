"""The paths of a target (a recipe's folder or a bundle) stay inside it.

A target names its outputs and stages itself, and its folder may hold links. What leads out of it is refused before
anything is opened: an output `../secret`, a stage named `../x`, a link to somebody's file, a pipe. A link may lead
out only to a file of DVC's cache, whose name is the md5 of its content (`cache.type: symlink`). In the repository of
the code that audits, `build` and the work folder may themselves be links to folders, on a larger disk for example.
"""

import os
import posixpath
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from kohaku_delta.errors import UserError

STAGE = re.compile(r"[\w-]+(@[\w.-]+)?")
CACHE = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?$")
MAX_FILES = 100_000  # a build has about a hundred


def check_stage(file: Path, name: str, outs: Iterable[str]) -> None:
    """Raises UserError for a stage of dvc.yaml or dvc.lock whose name is none, or with an output outside the folder."""
    if not STAGE.fullmatch(name):
        raise UserError(f"{file}: {name!r:.80} is not a name of a stage. DVC did not write this {file.name}.")
    for path in outs:
        if not is_inside(path):
            raise UserError(
                f"{file}: {name} has the output {path}, outside the recipe's folder. Correct dvc.yaml, and run "
                "`dvc repro` to write the lock again."
            )


def is_inside(path: str) -> bool:
    """Whether a path, seen from a folder, names something in it."""
    parts = posixpath.normpath(path).split("/")
    return not posixpath.isabs(path) and parts[0] not in ("..", ".") and "\0" not in path


def check_files(folder: Path, names: Iterable[str], moved: Iterable[str] = ()) -> None:
    """Raises UserError if one of these files or folders, or anything in them, leads out of `folder` or is no file.

    moved: names of folders in `folder` that may be links to folders elsewhere, which then belong to it.
    """
    inside, count = [os.path.realpath(folder / name) for name in ("", *moved)], 0
    for name in dict.fromkeys(names):
        _check(folder / name, inside)
        for parent, folders, files in os.walk(folder / name):
            for entry in folders + files:
                if any("\ud800" <= letter <= "\udfff" for letter in entry):
                    raise UserError(f"{parent} holds the file {entry}, whose name is not UTF-8. No stage writes it.")
                _check(Path(parent, entry), inside)
            count += len(folders) + len(files)
            if count > MAX_FILES:
                raise UserError(f"{folder / name} holds more than {MAX_FILES:,} files, which no recipe writes.")


def _check(path: Path, inside: list[str]) -> None:
    real = os.path.realpath(path)
    try:
        mode = os.stat(real).st_mode
    except OSError:  # it does not exist, or may not be looked at: its reader says so
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(
            f"{path} is not a regular file (a pipe, a socket or a device), which no stage writes. Remove it."
        )
    if any(os.path.commonpath([real, each]) == each for each in inside) or (stat.S_ISREG(mode) and CACHE.search(real)):
        return
    raise UserError(
        f"{path} is a link that leads out of the recipe's folder, and not to a file of DVC's cache. It is not "
        "followed: copy what it leads to, or run `dvc checkout --relink`. If the build or work folder is a link, audit "
        "it in its repository, with the kohaku-delta of that repository."
    )
