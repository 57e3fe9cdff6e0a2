"""Facts about this process for the record of its run.

The modules that know them register them here, so that the record imports neither torch nor the sandbox; otherwise the
code description of every data stage would contain both.
"""

from collections.abc import Callable
from typing import Any

_facts: dict[str, Callable[[str], Any]] = {}


def register(name: str, describe: Callable[[str], Any]) -> None:
    """Register `describe(device)`; it is called when the record is written. device: "cpu" or "cuda"."""
    _facts[name] = describe


def fact(name: str, device: str) -> Any | None:
    """The current value of a fact; None if nobody registered it."""
    return _facts[name](device) if name in _facts else None
