"""Reading and writing past the page cache (O_DIRECT), with the same bytes as through it.

A merge reads 14 GB once and writes 7 GB once. The page cache would copy every byte once more and evict the files of
other programs; a merge or bake takes twice as long that way (docs/performance.md). O_DIRECT needs offsets, lengths and
memory in whole blocks, which this module hides. A file system without O_DIRECT is used through its page cache, and so
are short reads and small files, for which read-ahead is worth more.
"""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np

from kohaku_delta.regular_files import open_descriptor

BLOCK = 4096  # bytes; enough for every device and file system
ALIGNMENT = 8  # bytes; numbers of any dtype may start at such an address
MIN_DIRECT = 1 << 18  # bytes of a read, or of a file to write, from which O_DIRECT pays
STAGE = 4 << 20  # bytes per write

# Freed at once: from then on glibc reuses freed arrays up to this size (its limit is 32 MiB). Otherwise it returns them
# to the system and gets cleared pages, which costs a merge a quarter of its time.
np.empty((32 << 20) - (64 << 10), np.uint8)


def aligned_buffer(size: int) -> memoryview:
    """At least `size` bytes of memory that start at a block boundary."""
    memory = np.empty(size + BLOCK, np.uint8)
    return memory.data[-memory.ctypes.data % BLOCK :]


class Reader:
    """An open file that any thread may read by position."""

    def __init__(self, path: Path):
        self.descriptor = open_descriptor(path)
        try:
            self._direct: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            self._direct = None
        self.size = os.fstat(self.descriptor).st_size

    def close(self) -> None:
        for descriptor in (self.descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def read(self, offset: int, length: int) -> memoryview:
        """The `length` bytes from `offset` on, in new memory; fewer only if the file ends before."""
        lead = offset % BLOCK
        if self._direct is not None and length >= MIN_DIRECT and offset % ALIGNMENT == 0:
            blocks = -(-(lead + length) // BLOCK) * BLOCK
            buffer = aligned_buffer(blocks)[:blocks]
            try:
                return buffer[lead : min(lead + length, _read_into(self._direct, buffer, offset - lead, BLOCK))]
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system accepted the flag but not the read
                    raise
        buffer = aligned_buffer(length)[:length]
        return buffer[: _read_into(self.descriptor, buffer, offset, 1)]


def _read_into(descriptor: int, buffer: memoryview, offset: int, block: int) -> int:
    """Fill `buffer` from the file; return how many bytes there were. A read that ends inside a block met the end."""
    done = 0
    while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], offset + done)):
        done += count
        if done % block:
            break
    return done


class Writer:
    """Writes an empty file of `size` bytes from its beginning. Call `close` before the descriptor is used again."""

    def __init__(self, descriptor: int, size: int):
        self._descriptor, self._stage, self._used = descriptor, aligned_buffer(STAGE), 0
        self._direct = size >= MIN_DIRECT and self._set_direct(True)

    def write(self, data: memoryview) -> None:
        """Append bytes. Raises OSError, for example if the disk is full."""
        while data:
            count = min(len(data), STAGE - self._used)
            self._stage[self._used : self._used + count] = data[:count]
            self._used, data = self._used + count, data[count:]
            if self._used == STAGE:
                self._flush()

    def close(self) -> None:
        """Write the rest through the page cache, because it may be no whole block."""
        if self._direct:
            self._set_direct(False)
        self._flush()

    def _flush(self) -> None:
        rest = self._stage[: self._used]
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)  # the file system accepted the flag but not the write
        self._used = 0

    def _set_direct(self, on: bool) -> bool:
        """Switch O_DIRECT on or off; return whether it is on."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
            return on
        except OSError:
            return False
