"""Invariant: a finding says PASS only of what was looked at; what could not be looked at is a SKIP with its reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kohaku_delta.errors import UserError

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One line of an audit."""

    group: str
    name: str
    status: str
    said: str


def format_some(names: Iterable[str], shown: int = SHOWN) -> str:
    """The first few, and how many more."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def pass_or_fail(group: str, name: str, faults: list[str], passed: str) -> Finding:
    """FAIL with the first faults, or PASS."""
    return (
        Finding(
            group,
            name,
            FAIL,
            "; ".join(faults[:SHOWN]) + (f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""),
        )
        if faults
        else Finding(group, name, PASS, passed)
    )


def check_or_fail(group: str, name: str, check: Callable[..., Finding], *arguments) -> Finding:
    """What a check found; FAIL where it was refused what it needs to read."""
    try:
        return check(*arguments)
    except UserError as refusal:
        return Finding(group, name, FAIL, refusal.message)


def summarize(found: list[Finding]) -> tuple[int, str]:
    """(exit code, sentence): 1 where anything failed, 2 where nothing could be looked at."""
    failed, passed, skipped = (
        [f"{each.group}/{each.name}" for each in found if each.status == status] for status in (FAIL, PASS, SKIP)
    )
    left = f"; {len(skipped)} not made: {', '.join(skipped)}" if skipped else ""
    if failed:
        return 1, f"FAIL: {format_some(failed, 6)} failed, {len(passed)} checks passed{left}"
    if not passed:
        return 2, f"nothing could be looked at{left}"
    return 0, f"PASS: {len(passed)} checks passed, none failed{left}"
