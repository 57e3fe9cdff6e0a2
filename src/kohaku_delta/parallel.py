"""A map on several threads that keeps the order of its items, and only a few results in memory.

numpy, Arrow, Pillow, SQLite, hashlib and the file system release the interpreter's lock, so threads share the work.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = min(8, len(os.sched_getaffinity(0)))  # one per processor of this process; a disk gives no more to more


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """function(item) for every item, in order. `threads` run at once, and at most `2 · threads` items have been taken
    whose results were not yet given back. An exception is raised in its item's place, and later items are cancelled.
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
