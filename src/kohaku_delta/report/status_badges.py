"""Invariant: nothing is called good that was not looked at; what was not looked at is called open.

A sign is one finding at the top of the page: good, bad, or open.
"""

from dataclasses import dataclass
from typing import Literal

from kohaku_delta.report.build_summary import Build

Kind = Literal["good", "bad", "open"]
LISTED = 5


@dataclass(frozen=True)
class StatusBadge:
    kind: Kind
    name: str
    short: str
    sentence: str


def status_badges(build: Build) -> list[StatusBadge]:
    """The audit first, then what can be seen without one."""
    return [_audit(build), _stages(build), _files(build), _recipe(build), _inputs(build), _published(build)]


def _audit(build: Build) -> StatusBadge:
    audit = build.told.audit
    if audit is None:
        return StatusBadge(
            "open",
            "Audit",
            "not audited",
            "The hashes here are those of dvc.lock. Whether the files still have them, kohaku-delta audit tells.",
        )
    if build.told.foreign:
        return StatusBadge(
            "open",
            "Audit",
            "of another lock",
            "audit.json does not say that it is of this dvc.lock: it says nothing of this build. Audit it again.",
        )
    count = {status: sum(finding.status == status for finding in audit.findings) for status in ("PASS", "FAIL", "SKIP")}
    told = ", ".join(
        f"{number} {word}"
        for number, word in ((count["PASS"], "passed"), (count["FAIL"], "failed"), (count["SKIP"], "not looked at"))
        if number
    )
    kind, short = {"PASS": ("good", "passed"), "FAIL": ("bad", "failed"), "SKIP": ("open", "nothing looked at")}[
        audit.verdict
    ]
    failed = [f"{each.group}/{each.name}: {each.said}" for each in audit.findings if each.status == "FAIL"]
    return StatusBadge(
        kind, "Audit", short, f"As kohaku-delta audit said of this very dvc.lock: {told}. {_some(failed)}".strip()
    )


def _stages(build: Build) -> StatusBadge:
    missing = [stage.name for stage in build.stages if not stage.outs]
    short = f"{len(build.stages) - len(missing)} of {len(build.stages)} have run"
    if missing:
        return StatusBadge("bad", "Stages", short, f"Not in dvc.lock: {_some(missing)}.")
    return StatusBadge("good", "Stages", short, "dvc.lock has every stage of dvc.yaml.")


def _files(build: Build) -> StatusBadge:
    whole = sum(len(stage.outs) for stage in build.stages)
    short = f"{whole - len(build.lost)} of {whole} at hand"
    if not build.lost:
        return StatusBadge(
            "good" if whole else "open",
            "Files",
            short,
            "Each has the size that the lock says; the bytes were not compared.",
        )
    kind = "open" if set(build.lost.values()) == {"not at hand"} else "bad"
    return StatusBadge(kind, "Files", short, _some([f"{path}: {why}" for path, why in build.lost.items()]) + ".")


def _recipe(build: Build) -> StatusBadge:
    if build.changed:
        sentence = f"Stages ran with other values of {_some(build.changed)} than params.yaml, or than each other. This page shows what they ran with."
        return StatusBadge("bad", "Recipe", "changed since", sentence)
    return StatusBadge(
        "good", "Recipe", "as it ran", "params.yaml has the values that dvc.lock says the stages ran with."
    )


def _inputs(build: Build) -> StatusBadge:
    if not build.sources:
        return StatusBadge(
            "open", "Inputs", "not listed", "inputs.json is not there: the download stage has not run here."
        )
    bad = [f"{source.name}: {source.pin}" for source in build.sources if not source.good]
    whole = sum(source.pin == "pinned" for source in build.sources)
    short = f"{whole:,} of {len(build.sources):,} pinned"
    if bad:
        return StatusBadge("bad", "Inputs", short, _some(bad) + ".")
    if whole == len(build.sources):
        return StatusBadge("good", "Inputs", short, "Each has the size and sha256 that the recipe knew before.")
    return StatusBadge(
        "open", "Inputs", short, "Of the others the recipe knows no whole sha256; inputs.json recorded what was found."
    )


def _published(build: Build) -> StatusBadge:
    if build.miniature:
        return StatusBadge(
            "open",
            "Release",
            "not compared",
            "This is the miniature: the release published nothing to compare it with.",
        )
    if not build.release:
        return StatusBadge(
            "open",
            "Release",
            "not compared",
            "This is another recipe than the release's: nothing was published to compare it with.",
        )
    equal = [weights.file for weights in build.weights if weights.sha256 == weights.published]
    short = f"{len(equal)} of {len(build.weights)} files equal"
    if equal and len(equal) == len(build.weights):
        return StatusBadge("good", "Release", short, "Base, LoKr and final model have the published sha256.")
    return StatusBadge(
        "open",
        "Release",
        short,
        "A rebuilt file need not have the published sha256: the fidelity table says what cannot be had again.",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else "")
