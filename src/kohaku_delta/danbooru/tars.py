"""The tars of danbooru2023: which posts each one holds, by its number, and the bytes of a member. A tar is read in
place, never unpacked.

A post's file is in `data-XXXX.tar` with XXXX = id % 1000 (main), else in id % 1000 + 1000 (recent), else in 2000
(add-on), else in an update (`update-<date>-<number>.tar`, as tar_links names them), the earliest date first.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError

# inputs_manifest compares an input without a stamp with the sha256 in inputs.json, which stays as it is
HASH_AGAIN = (
    "Delete build/inputs.verified.json and run `dvc repro`: it hashes every input again and names the damaged ones."
)

NAME = re.compile(r"data-([0-9]{1,4})\.tar")
UPDATE = re.compile(r"update-([0-9A-Za-z_]+)-([0-9]{1,4})\.tar")
MAIN, ADD_ON = range(1000), 2000
UPDATES = 10_000  # updates are numbered from here, by date


def tars_in(folder) -> dict[int, Path]:
    """The tars of a folder, by number. Other files are ignored."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"The tars folder {folder} does not exist. Set --tars to the folder that holds data-0000.tar …."
        )
    named = (path for path in folder.iterdir() if NAME.fullmatch(path.name) or UPDATE.fullmatch(path.name))
    return tars_by_number(sorted(path for path in named if path.is_file()))


def tars_by_number(paths: list[Path]) -> dict[int, Path]:
    """The tars by the number in their names; updates by date. Raises UserError unless they are in one folder."""
    found: dict[int, Path] = {}
    updates = {path.name: name for path in paths if (name := UPDATE.fullmatch(path.name))}
    by_date = sorted(updates, key=lambda name: (updates[name][1], int(updates[name][2])))
    for path in map(Path, paths):
        name = NAME.fullmatch(path.name)
        if name is None and path.name not in updates:
            raise UserError(
                f"{path} is not named like a tar of danbooru2023 (data-0000.tar); the name says which posts it holds."
            )
        other = found.setdefault(int(name[1]) if name else UPDATES + by_date.index(path.name), path)
        if other != path:
            raise UserError(f"{other} and {path} have the same number. Remove one of them.")
    folders = sorted({str(path.parent) for path in found.values()})
    if len(folders) > 1:
        raise UserError(
            f"The tars are in different folders ({', '.join(folders[:3])}). Put them into one (links will do), and pin "
            "them there as file:// (download.inputs.tars)."
        )
    return found


def in_main_tars(ids: np.ndarray, numbers: Iterable[int]) -> np.ndarray:
    """Those of the posts `ids` (int64) whose main tar is among the tars of these numbers."""
    return ids[np.isin(ids % len(MAIN), [number for number in numbers if number in MAIN])]


def read_member(folder, tar: str, offset: int, size: int) -> bytes:
    """The bytes of a member, by its columns in posts.parquet. Raises UserError if they cannot be read."""
    path = Path(folder) / tar
    try:
        with open(path, "rb", buffering=0) as file:
            data = pread_fully(file.fileno(), offset, size)
    except OSError as error:
        raise read_error(path, offset, size, error) from None
    if len(data) != size:
        raise UserError(
            f"{path} ends at byte {offset + len(data):,}, but a member reaches to {offset + size:,}. It has been "
            f"changed since it was checked. {HASH_AGAIN}"
        )
    return data


def read_error(path: Path, offset: int, size: int, error: OSError) -> UserError:
    """What to raise if the system cannot read a member."""
    return UserError(
        f"{path} cannot be read from byte {offset:,} to {offset + size:,}: {error.strerror}. "
        f"Look at its disk (`dmesg`). {HASH_AGAIN}"
    )


def pread_fully(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer only at the end of the file (one system call reads at most 2 GiB)."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
