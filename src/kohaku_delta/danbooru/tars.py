"""Invariant: a tar is read in place, never unpacked; its number says whose files it holds.

Layout: a post's file lies in `data-XXXX.tar` for XXXX = id % 1000 (main), else in id % 1000 + 1000 (recent), else in
2000 (add-on).
"""

import os
import re
from pathlib import Path

from kohaku_delta.errors import UserError

NAME = re.compile(r"data-(\d+)\.tar")
ADD_ON = 2000


def tars_in(tars) -> dict[int, Path]:
    """The tars of a folder, by number. Other files are passed over."""
    tars = Path(tars)
    if not tars.is_dir():
        raise UserError(f"The tars folder {tars} is not there. Name the folder that holds data-0000.tar … by --tars.")
    return tars_by_number(sorted(path for path in tars.iterdir() if NAME.fullmatch(path.name) and path.is_file()))


def tars_by_number(paths: list[Path]) -> dict[int, Path]:
    """The number that each tar's name carries → its path. All of them lie in one folder."""
    found: dict[int, Path] = {}
    for path in map(Path, paths):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise UserError(
                f"{path} is not named as a tar of danbooru2023 is (data-0000.tar); its name says which posts it holds."
            )
        other = found.setdefault(int(name[1]), path)
        if other != path:
            raise UserError(f"{other} and {path} carry the same number. Remove one of them.")
    places = sorted({str(path.parent) for path in found.values()})
    if len(places) > 1:
        raise UserError(f"The tars lie in different folders ({', '.join(places[:3])}). Put them into one.")
    return found


def read_member(folder, tar: str, offset: int, size: int) -> bytes:
    """The bytes of one member, as posts.parquet names it."""
    path = Path(folder) / tar
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = pread_fully(descriptor, offset, size)
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise UserError(
            f"{path} ends at byte {offset + len(data):,}, but a member reaches to {offset + size:,}. It changed since the filter stage ran: run that again."
        )
    return data


def pread_fully(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer only at the end of the file (one call to the system reads at most 2 GiB)."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
