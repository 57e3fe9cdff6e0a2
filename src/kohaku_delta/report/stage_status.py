"""The stages of dvc.yaml with what dvc.lock recorded of each run: hashes, sizes and parameters.

What the files are now is not looked at here.
"""

from dataclasses import dataclass
from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.provenance import dvc_lock, dvc_yaml, stage_record
from kohaku_delta.provenance.dvc_lock import LockedPath
from kohaku_delta.provenance.stage_record import Record


@dataclass(frozen=True)
class StageStatus:
    name: str
    reads: list[str]  # names of the stages whose outputs it depends on
    outs: dict[str, LockedPath]  # path → dvc.lock's entry; empty if the stage has not run
    params: dict  # section or dotted key → value, as in dvc.lock
    record: Record | None = None  # of the run that wrote exactly these outputs


def read_stages(folder: Path) -> list[StageStatus]:
    """The stages of the recipe in `folder`, in the order of dvc.yaml. Refuses a lock with an output outside it."""
    declared, locked = dvc_yaml.stage_declarations(folder), dvc_lock.read_lock(folder / dvc_yaml.LOCK)
    writers = {out: name for name, stage in declared.items() for out in stage.outs}
    stages = []
    for name, stage in declared.items():
        reads = list(dict.fromkeys(writers[dep] for dep in stage.deps if dep in writers))
        entry = locked.get(name)
        if not entry:
            stages.append(StageStatus(name, reads, {}, {}))
            continue
        outs = {out.path: out for out in entry.outs}
        record_path = folder / paths.RECORDS / stage_record.record_filename(name, entry.key())
        record = stage_record.read_record(record_path) if record_path.is_file() else None
        if record and {path: output.md5 for path, output in record.outputs.items()} != {
            path: out.md5 for path, out in outs.items()
        }:
            record = None
        stages.append(StageStatus(name, reads, outs, entry.parameters, record))
    return stages


def merged_parameters(stages: list[StageStatus]) -> tuple[dict, list[str]]:
    """The recipe's sections as the stages ran with them, and the keys on which two stages disagree (one of them ran
    before a change).
    """
    sections: dict = {}
    disagreeing: dict[str, None] = {}
    for stage in stages:
        for key, value in stage.params.items():
            if sections.setdefault(key, value) != value:
                disagreeing[key] = None
            sections[key] = value
    for key in [key for key in sections if "." in key]:  # one value of a section that another stage has whole
        value, (section, *names) = sections.pop(key), key.split(".")
        of_section = sections.get(section)
        for name in names:
            of_section = of_section.get(name) if isinstance(of_section, dict) else None
        if section in sections and of_section != value:
            disagreeing[key] = None
    return sections, list(disagreeing)
