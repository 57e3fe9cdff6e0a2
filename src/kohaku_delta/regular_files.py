"""Files of strangers: only regular files are opened, without waiting, and read up to a limit.

A named pipe would keep its reader waiting for ever, and a device such as /dev/zero has no end.
"""

import io
import os
import stat
from pathlib import Path

from kohaku_delta.errors import UserError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_descriptor(path: Path) -> int:
    """A descriptor of the file, open for reading. Raises UserError for anything but a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'no file')}; a regular file was expected.")
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def open_regular(path: Path) -> io.FileIO:
    """The same file as an object, without a buffer."""
    return io.FileIO(open_descriptor(path))


def read_regular(path: Path, max_bytes: int, remedy: str = "") -> bytes:
    """The content of a regular file. Raises FileNotFoundError, and UserError for one of more than `max_bytes`."""
    with io.BufferedReader(open_regular(path)) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:,} bytes, the limit for such a file. {remedy}".rstrip())
    return content
