"""Invariant: what another command said of this build is repeated as said by it, and counts only for the lock and the
outs that it names.

build/records/ (what each stage's run left), provenance.json beside dvc.lock and build/audit.json (`kohaku-delta audit
--json`) may be absent: then nothing is claimed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from kohaku_delta import strict_model
from kohaku_delta.report.stage_status import StageStatus
from kohaku_delta.strict_model import PartialModel

MAX_BYTES = 64 << 20  # of a JSON file
RECORDS, PROVENANCE, AUDIT = "records", "provenance.json", "audit.json"


class Finding(PartialModel):
    group: str
    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    said: str


class Audit(PartialModel):
    lock: str | None = None  # sha256 of the dvc.lock that was audited
    findings: list[Finding] = Field(min_length=1)

    @property
    def verdict(self) -> str:
        """Counted here, so that a list with a failure never shows as passed."""
        found = {finding.status for finding in self.findings}
        return "FAIL" if "FAIL" in found else "PASS" if "PASS" in found else "SKIP"


class Output(PartialModel):
    md5: str


class Revision(PartialModel):
    commit: str
    dirty: bool


class Times(PartialModel):
    seconds: float = Field(ge=0, allow_inf_nan=False)


class Record(PartialModel):
    """What is shown of the record that a stage's run left; the audit reads more of it."""

    stage: str
    outputs: dict[str, Output]
    times: Times
    revision: Revision | None = None
    container: str | None = None
    host: dict[str, str] = {}


@dataclass(frozen=True)
class ExternalEvidence:
    records: dict[str, Record]  # stage → the record of a run that wrote the very outs of the lock
    provenance: str | None  # sha256 of provenance.json
    audit: Audit | None
    foreign: bool  # the audit does not say that it is of this build's lock


def read_evidence(folder: Path, lock: Path, stages: list[StageStatus]) -> ExternalEvidence:
    """What lies in the build's `folder`, and beside its `lock`."""
    wrote = {stage.name: {path: out.md5 for path, out in stage.outs.items()} for stage in stages if stage.outs}
    records = {}
    for path in sorted((folder / RECORDS).glob("*.json")):
        record = _read(path, Record)
        if wrote.get(record.stage) == {name: output.md5 for name, output in record.outputs.items()}:
            records.setdefault(record.stage, record)
    audit, provenance = _read(folder / AUDIT, Audit), lock.parent / PROVENANCE
    return ExternalEvidence(
        records=records,
        provenance=hashlib.sha256(provenance.read_bytes()).hexdigest() if provenance.is_file() else None,
        audit=audit,
        foreign=audit is not None and audit.lock != hashlib.sha256(lock.read_bytes()).hexdigest(),
    )


def _read(path: Path, kind):
    try:
        return strict_model.read_json(path, kind, MAX_BYTES, "Delete it, or run the command again that writes it.")
    except FileNotFoundError:
        return None
