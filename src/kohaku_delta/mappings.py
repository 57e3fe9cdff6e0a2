"""Mappings compared by key."""

from collections.abc import Mapping
from typing import Any


def differing_keys(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[Any]:
    """The keys whose values differ, or that only one of the two has; sorted. A value None counts as a missing key."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
