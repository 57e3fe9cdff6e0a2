"""One progress bar of bytes for many threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(description: str, total: int, initial: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with rate and time left. Yields advance(count), which may be called from any thread."""
    lock = threading.Lock()
    with tqdm(
        desc=description, unit="B", unit_scale=True, total=total, initial=initial, disable=None if total else True
    ) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance
