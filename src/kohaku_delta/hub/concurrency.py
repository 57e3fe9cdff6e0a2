"""Invariant: many files at once, one bar, one end: what fails does not hold up the rest, and is told when the rest is
there.
"""

import shutil
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from kohaku_delta.errors import UserError

PARALLEL = 8  # files that are fetched at once
SHOWN = 5  # sentences about files that could not be fetched
Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


def map_concurrently(function: Callable[[Item, threading.Event], Result], items: Sequence[Item]) -> dict[Item, Result]:
    """function(item, stop) of every item, PARALLEL at once. Refusals are gathered into one; whatever else is raised
    (Ctrl-C too) sets `stop` for all.
    """
    done, refusals, stop = {}, {}, threading.Event()
    with ThreadPoolExecutor(PARALLEL) as pool:
        futures = {pool.submit(function, item, stop): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                try:
                    done[items[futures[future]]] = future.result()
                except UserError as refusal:
                    refusals[futures[future]] = refusal.message
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if refusals:
        sentences = list(dict.fromkeys(message for _, message in sorted(refusals.items())))
        more = [f"{len(sentences) - SHOWN:,} more files could not be fetched."] if len(sentences) > SHOWN else []
        raise UserError("\n".join(sentences[:SHOWN] + more))
    return done


def require_free_space(mirror: Path, needed: int) -> None:
    """Refuses when the disk of the mirror has no room for `needed` bytes."""
    place = next(folder for folder in (mirror.absolute(), *mirror.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{needed:,} bytes are still to be fetched into {mirror}, and {free:,} are free there. Free some, or make it a link to a larger disk."
        )


@contextmanager
def progress_bar(what: str, total: int, initial: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with rate and time left; what it yields may be called from any thread."""
    lock = threading.Lock()
    with tqdm(
        desc=what, unit="B", unit_scale=True, total=total, initial=initial, disable=None if total else True
    ) as shown:

        def advance(count: int) -> None:
            with lock:
                shown.update(count)

        yield advance


def log_above_bar(sentence: str) -> None:
    """A sentence above the bar."""
    tqdm.write(sentence, file=sys.stderr)
