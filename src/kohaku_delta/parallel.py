"""Invariant: results come in the order of their items, whatever the number of threads, and no more than a few wait in
memory.

numpy, Arrow, Pillow, SQLite, hashlib and the file system let go of the interpreter's lock, so threads really share the
work.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = min(
    8, len(os.sched_getaffinity(0))
)  # one a processor that this process may use; a disk gives no more to more


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """function(item) for every item, in order; up to `threads` at once, `2 · threads` begun or waiting. An item is
    drawn only when it is due.

    What one of them raises is raised at its place, and the rest is not begun.
    """
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
