"""Invariant: reading and writing past the page cache moves the same bytes as through it; a file system that cannot do
it is used as any other.

A merge reads 14 GB once and writes 7 GB once. Through the page cache the processor copies each of those bytes once
more, into memory that it must find first, and other programs lose what they had there. O_DIRECT asks for places,
lengths and memory in whole blocks, which is all that this module hides. Short reads and small files go through the page
cache: there reading ahead is worth more.
"""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np

BLOCK = 4096  # what every device and file system is content with
ALIGNED = (
    8  # where numbers of any dtype may lie in memory; a file whose tensors lie elsewhere is read through the page cache
)
LEAST = 1 << 18  # bytes of a read, or of a file to write, from which it is worth it
STAGE = 4 << 20  # bytes written at a time


def aligned_buffer(size: int) -> np.ndarray:
    """`size` bytes and room for whole blocks around them, beginning at a block's boundary."""
    return align_view(np.empty(size + 3 * BLOCK, np.uint8))


def align_view(held: np.ndarray) -> np.ndarray:
    """All of `held` (uint8) but one block, beginning at a block's boundary."""
    first = -held.ctypes.data % BLOCK
    return held[first : first + held.size - BLOCK]


class Reader:
    """An open file, read by position from any thread."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._past: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            self._past = None
        self.size = os.fstat(self.descriptor).st_size

    def close(self) -> None:
        for descriptor in (self.descriptor, self._past):
            if descriptor is not None:
                os.close(descriptor)

    def read(self, place: int, length: int, into: np.ndarray) -> memoryview:
        """The bytes at place … place + length, somewhere in `into`, which is `memory` of that length; fewer where the
        file ends before.
        """
        if self._past is not None and length >= LEAST and place % ALIGNED == 0:
            first = place - place % BLOCK
            try:
                found = _fill(self._past, memoryview(into)[: -(-(place + length - first) // BLOCK) * BLOCK], first)
                return memoryview(into)[place - first : min(place - first + length, found)]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return memoryview(into)[: _fill(self.descriptor, memoryview(into)[:length], place)]


def _fill(descriptor: int, room: memoryview, place: int) -> int:
    done = 0
    while done < len(room):
        read = os.preadv(descriptor, [room[done:]], place + done)
        done += read
        if not read or done % BLOCK:  # past the page cache a read that is no whole block has met the file's end
            rest = done < len(room) and read and not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
            if not rest:
                break
    return done


class Writer:
    """Writes an empty file of a known size from its beginning; `close` before anything else is done with the
    descriptor.
    """

    def __init__(self, descriptor: int, size: int):
        self._descriptor, self._stage, self._held = descriptor, aligned_buffer(STAGE), 0
        self._direct = size >= LEAST and self._switch(True)

    def write(self, data: memoryview) -> None:
        while data:
            taken = min(len(data), STAGE - self._held)
            memoryview(self._stage)[self._held : self._held + taken] = data[:taken]
            self._held, data = self._held + taken, data[taken:]
            if self._held == STAGE:
                self._flush()

    def close(self) -> None:
        """Writes the rest, which may be no whole block, through the page cache."""
        if self._direct:
            self._switch(False)
        self._flush()

    def _flush(self) -> None:
        rest = memoryview(self._stage)[: self._held]
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._switch(False)  # the file system took the flag and does not keep it
        self._held = 0

    def _switch(self, on: bool) -> bool:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
            return on
        except OSError:
            return False
