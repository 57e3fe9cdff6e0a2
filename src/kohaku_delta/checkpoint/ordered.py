"""Invariant: results come in the order of their items, whatever the number of threads, and no more than a few wait in memory.

numpy, hashlib and the file system let go of the interpreter's lock, so threads really share the work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = 2


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """function(item) for every item, in order; up to `threads` at once, `2 · threads` begun or waiting. An item is drawn only when it is due."""
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Spare:
    """Memory to use again: fresh memory costs the system a page fault every 4 KiB, which is more than what is computed in it.

    Any thread may `take` and `give`; what is not given back is garbage, as any array is."""

    def __init__(self, size: int):
        self._size, self._kept = size, deque()

    def take(self, size: int) -> np.ndarray:
        """At least `size` bytes, of whatever value."""
        if size > self._size:
            return np.empty(size, np.uint8)
        try:
            return self._kept.pop()
        except IndexError:
            return np.empty(self._size, np.uint8)

    def give(self, memory: np.ndarray) -> None:
        if memory.size == self._size:
            self._kept.append(memory)
