"""The result of a check: PASS, FAIL with the first faults, or SKIP with its reason.

A check is a generator that yields a sentence per fault and returns the sentence of its PASS; one that cannot fail just
returns it. A check passes nothing that it did not look at: it raises Skip with the reason instead. A UserError that it
meets (a file that is damaged or is not what it should be) is a fault.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import wraps

from kohaku_delta.errors import UserError
from kohaku_delta.printing import format_some
from kohaku_delta.provenance.artifact import Artifact

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
NECESSARY = ("lock/pipeline", "lock/code")  # what was run: without these no PASS of another check means anything
SHOWN = 3  # faults listed; the others are counted

Check = Generator[str, None, str]


class Skip(Exception):
    """Raised by a check that cannot look at what it is about; its text is the reason."""


@dataclass(frozen=True)
class Finding:
    """One line of an audit. The check's public name is group/name; outputs: what it compares with what that was made
    of, or computes again, unless it is a SKIP.
    """

    group: str
    name: str
    status: str
    message: str
    outputs: tuple[str, ...] = ()


def check(name: str, *outputs: str) -> Callable[[Callable[..., Check | str]], Callable[..., Finding]]:
    """Turns a check, whose first argument is the Artifact, into a function that returns a Finding. name:
    group/name; outputs: those that it compares with what they were made of, or computes again.
    """
    group, _, short_name = name.partition("/")

    def decorate(find_faults: Callable[..., Check | str]) -> Callable[..., Finding]:
        @wraps(find_faults)
        def run(rebuild: Artifact, *arguments) -> Finding:
            faults: list[str] = []
            status = PASS
            try:
                result = find_faults(rebuild, *arguments)
                while not isinstance(result, str):
                    faults.append(next(result))
                message = result
            except StopIteration as end:
                message = end.value
            except Skip as reason:
                status, message = SKIP, str(reason)
            except UserError as error:
                message = ""
                faults.append(error.message.replace(f"{rebuild.folder}/", ""))
            if faults:
                more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
                status, message = FAIL, "; ".join(faults[:SHOWN]) + more
            return Finding(group, short_name, status, message, outputs)

        return run

    return decorate


def not_looked_at(findings: list[Finding], outputs: Iterable[str]) -> list[str]:
    """The outputs that no check compared with what they were made of. A check that names a folder has looked at
    everything in it.
    """
    seen = {out for finding in findings if finding.status != SKIP for out in finding.outputs}
    return [out for out in outputs if out not in seen and not any(out.startswith(f"{folder}/") for folder in seen)]


def summarize(findings: list[Finding]) -> tuple[int, str]:
    """(exit code, verdict): 0 if nothing failed, 1 if anything did, 2 if it cannot be judged, because nothing was
    checked or because it is not known what was run.
    """
    failed, passed, skipped = (
        [f"{finding.group}/{finding.name}" for finding in findings if finding.status == status]
        for status in (FAIL, PASS, SKIP)
    )
    not_made = f"; {len(skipped)} not made: {', '.join(skipped)}" if skipped else ""
    if failed:
        return 1, f"FAIL: {format_some(failed, 6)} failed, {len(passed)} checks passed{not_made}"
    if not passed:
        return 2, f"nothing could be checked{not_made}"
    if unknown := [name for name in skipped if name in NECESSARY]:
        return 2, f"it cannot be judged without {' and '.join(unknown)}; {len(passed)} checks passed{not_made}"
    return 0, f"PASS: {len(passed)} checks passed, none failed{not_made}"
