"""Invariant: results come in the order of their items, whatever the number of threads; only a few are held at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

MOST = 8  # threads; a disk gives no more to more


def threads() -> int:
    """How many threads work: one a processor that this process may use, at most MOST."""
    return min(MOST, len(os.sched_getaffinity(0)))


def in_order(work: Callable, items: Iterable) -> Iterator:
    """work(item) of each item, done ahead in threads. What one of them raises is raised at its place, and the rest is not begun."""
    count = threads()
    with ThreadPoolExecutor(count) as pool:
        ahead = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for each in ahead:
                each.cancel()
