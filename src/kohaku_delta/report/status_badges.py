"""The findings at the top of the page. Nothing is called good that was not checked; what was not checked is "open"."""

from dataclasses import dataclass
from typing import Literal

from kohaku_delta.printing import format_some
from kohaku_delta.report.build_summary import MISSING, Build

LISTED = 5
Kind = Literal["good", "bad", "open"]
STATUS_WORDS = {"PASS": "passed", "FAIL": "failed", "SKIP": "skipped"}


@dataclass(frozen=True)
class StatusBadge:
    kind: Kind
    name: str
    status: str
    sentence: str


def status_badges(build: Build) -> list[StatusBadge]:
    """The audit first, then what can be seen without one."""
    return [_audit(build), _stages(build), _files(build), _recipe(build), _inputs(build), _published(build)]


def _audit(build: Build) -> StatusBadge:
    if build.other_audit:
        sentence = "audit.json does not name this dvc.lock, so it says nothing about this build. Audit it again."
        return StatusBadge("open", "Audit", "of another lock", sentence)
    if build.audit is None:
        sentence = (
            "The hashes on this page are those of dvc.lock. Run kohaku-delta audit to check the files against them."
        )
        return StatusBadge("open", "Audit", "not audited", sentence)
    statuses = [finding.status for finding in build.audit.findings]
    counts = [f"{statuses.count(status)} {word}" for status, word in STATUS_WORDS.items() if status in statuses]
    failed = [f"{each.group}/{each.name}: {each.said}" for each in build.audit.findings if each.status == "FAIL"]
    sentence = f"kohaku-delta audit on this very dvc.lock: {', '.join(counts)}. {format_some(failed, LISTED)}".strip()
    if failed:
        return StatusBadge("bad", "Audit", "failed", sentence)
    if "PASS" in statuses:
        return StatusBadge("good", "Audit", "passed", sentence)
    return StatusBadge("open", "Audit", "nothing was checked", sentence)


def _stages(build: Build) -> StatusBadge:
    missing = [stage.name for stage in build.stages if not stage.outs]
    status = f"{len(build.stages) - len(missing)} of {len(build.stages)} have run"
    if missing:
        return StatusBadge("bad", "Stages", status, f"Not in dvc.lock: {format_some(missing, LISTED)}.")
    return StatusBadge("good", "Stages", status, "dvc.lock has every stage of dvc.yaml.")


def _files(build: Build) -> StatusBadge:
    total = sum(len(stage.outs) for stage in build.stages)
    status = f"{total - len(build.damaged)} of {total} present"
    if build.damaged:
        kind: Kind = "open" if set(build.damaged.values()) == {MISSING} else "bad"
        faults = [f"{path}: {fault}" for path, fault in build.damaged.items()]
        return StatusBadge(kind, "Files", status, format_some(faults, LISTED) + ".")
    sentence = "Each has the size that dvc.lock says; the bytes were not compared."
    return StatusBadge("good" if total else "open", "Files", status, sentence)


def _recipe(build: Build) -> StatusBadge:
    if build.changed:
        sentence = (
            f"Stages ran with other values of {format_some(build.changed, LISTED)} than params.yaml, or than each "
            "other. This page shows what they ran with."
        )
        return StatusBadge("bad", "Recipe", "changed since", sentence)
    sentence = "params.yaml has the values that dvc.lock says the stages ran with."
    return StatusBadge("good", "Recipe", "as it ran", sentence)


def _inputs(build: Build) -> StatusBadge:
    if not build.sources:
        sentence = "inputs.json is missing: the download stage has not run here."
        return StatusBadge("open", "Inputs", "not listed", sentence)
    pinned = sum(source.pin == "pinned" for source in build.sources)
    status = f"{pinned:,} of {len(build.sources):,} pinned"
    bad = [f"{source.name}: {source.pin}" for source in build.sources if not source.good]
    if bad:
        return StatusBadge("bad", "Inputs", status, format_some(bad, LISTED) + ".")
    if pinned == len(build.sources):
        return StatusBadge("good", "Inputs", status, "Each has the size and sha256 that the recipe pins.")
    sentence = "The recipe has no whole sha256 for the others; inputs.json recorded what was found."
    return StatusBadge("open", "Inputs", status, sentence)


def _published(build: Build) -> StatusBadge:
    if not build.is_release:
        what = "the miniature" if build.is_miniature else "another recipe than the release's"
        sentence = f"This is {what}: nothing was published to compare it with."
        return StatusBadge("open", "Release", "not compared", sentence)
    equal = sum(weights.sha256 == weights.published for weights in build.weights)
    status = f"{equal} of {len(build.weights)} files equal"
    if equal and equal == len(build.weights):
        return StatusBadge("good", "Release", status, "Base, LoKr and final model have the published sha256.")
    sentence = "A rebuilt file need not have the published sha256: the fidelity table says what cannot be reproduced."
    return StatusBadge("open", "Release", status, sentence)
