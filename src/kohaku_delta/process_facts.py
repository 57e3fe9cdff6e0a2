"""What this process says of itself for the record of its run. Those who know it register it, so that the record imports
neither torch nor the sandbox.
"""

from collections.abc import Callable

_facts: dict[str, Callable[[str], object]] = {}


def register(name: str, describe: Callable[[str], object]) -> None:
    """describe(device) is called when the record is written; device is "cpu" or "cuda"."""
    _facts[name] = describe


def fact(name: str, device: str):
    """The fact at this moment; None if nobody registered it."""
    return _facts[name](device) if name in _facts else None
