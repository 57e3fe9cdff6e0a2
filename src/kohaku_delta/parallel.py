"""Maps a function over items in threads. Results keep the order of the items, whatever the number of threads.

numpy, Arrow, Pillow, SQLite, hashlib and the file system release the interpreter's lock, so threads share the work.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from kohaku_delta.errors import UserError

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
THREADS = min(8, len(os.sched_getaffinity(0)))  # one per processor of this process; a disk is no faster with more
DOWNLOADS = 8  # threads of map_all, which wait for a network
SHOWN = 5  # error messages


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """function(item) for every item, in order. At most `threads` run at once, and `2 * threads` results wait in memory.

    An exception of one of them is raised in its place, and the rest is not started.
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


def map_all(function: Callable[[Key, threading.Event], Result], items: Sequence[Key]) -> dict[Key, Result]:
    """{item: function(item, stop)} for every item, even if some raise UserError: these are raised together at the end.
    Any other exception (Ctrl-C too) sets `stop` for all.
    """
    results, errors, stop = {}, {}, threading.Event()
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        futures = {pool.submit(function, item, stop): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                try:
                    results[items[futures[future]]] = future.result()
                except UserError as error:
                    errors[futures[future]] = error.lines
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if errors:
        messages = list(dict.fromkeys(line for _, lines in sorted(errors.items()) for line in lines))
        more = [f"{len(messages) - SHOWN:,} more files failed."] if len(messages) > SHOWN else []
        raise UserError(*messages[:SHOWN], *more)
    return results
