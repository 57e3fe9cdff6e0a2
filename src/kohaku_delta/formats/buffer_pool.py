"""Invariant: a piece of memory has one user at a time; its contents are nobody's.

Fresh memory costs the system a page fault every 4 KiB, which is more than what is computed in it.
"""

from collections import deque

import numpy as np

from kohaku_delta.formats import direct_io


class BufferPool:
    """Memory to use again, as direct.memory gives it.

    Any thread may `take` and `give`; what is not given back is garbage, as any array is."""

    def __init__(self, size: int):
        self._size, self._kept = size, deque()

    def acquire(self, size: int) -> np.ndarray:
        """At least `size` bytes, of whatever value."""
        if size > self._size:
            return direct_io.aligned_buffer(size)
        try:
            return self._kept.pop()
        except IndexError:
            return direct_io.aligned_buffer(self._size)

    def release(self, array: np.ndarray) -> None:
        """Takes back what was taken, or any view of it."""
        whole = array.base
        if whole.size == self._size + 3 * direct_io.BLOCK:
            self._kept.append(direct_io.align_view(whole))
