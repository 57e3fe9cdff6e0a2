"""Invariant: a record is taken for that of the run that the lock names only if every hash of it says so; a stage
without one is a SKIP by name.
"""

import posixpath

from kohaku_delta.formats import hashing
from kohaku_delta.provenance import stage_record
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.findings import SKIP, Finding, format_some, pass_or_fail

GROUP = "lock"


def check_all_records(rebuild: Artifact) -> list[Finding]:
    """Each stage's record has the lock's command, inputs, parameters and outs, and the sha256 of the outs that are
    there.
    """
    faults = list(rebuild.unreadable.values())
    for name, each in rebuild.records.items():
        faults += _faults(rebuild, name, each)
    if rebuild.bundle:
        known = {stage_record.record_filename(name, stage.key()) for name, stage in rebuild.lock.items()}
        strange = [
            path.name for path in sorted((rebuild.folder / stage_record.FOLDER).glob("*")) if path.name not in known
        ]
        faults += [f"{place} is the record of another run: dvc.lock names none of that key" for place in strange]
    missing = [name for name in rebuild.lock if name not in rebuild.records and name not in rebuild.unreadable]
    found = []
    if rebuild.records or faults:
        files = sum(path in rebuild.digests for each in rebuild.records.values() for path in each.outputs)
        found.append(
            pass_or_fail(
                GROUP,
                "records",
                faults,
                f"{len(rebuild.records)} records are of the runs that dvc.lock names; {files} of their outs have the recorded sha256",
            )
        )
    if missing:
        found.append(
            Finding(
                GROUP,
                "unrecorded",
                SKIP,
                f"no record of {', '.join(missing)}: restored from DVC's cache, or run elsewhere",
            )
        )
    return found


def _faults(rebuild: Artifact, name: str, said: Record) -> list[str]:
    locked = rebuild.lock[name]
    if said.stage != name or said.command != locked.cmd:
        return [f"the record of {name} is of another run: it ran {said.stage}, “{said.command}”"]
    faults = []
    for what, recorded, places in (("read", said.inputs, locked.deps), ("wrote", said.outputs, locked.outs)):
        listed = {posixpath.normpath(each.path): each for each in places}
        for path in sorted(listed.keys() | recorded.keys()):
            if path not in recorded or path not in listed:
                faults.append(f"the record of {name} {'knows nothing of' if path in listed else f'{what} also'} {path}")
            elif (recorded[path].md5, recorded[path].bytes) != (listed[path].md5, listed[path].size):
                faults.append(
                    f"the record of {name} is of another run: it {what} {path} with md5 {recorded[path].md5[:8]}…, dvc.lock says {listed[path].md5[:8]}…"
                )
    if (
        stage_record.record_key(
            said.command, {path: each.md5 for path, each in said.inputs.items()}, said.parameters_after
        )
        != locked.key()
        and not faults
    ):
        faults.append(f"the record of {name} is of another run: its parameters are not those of dvc.lock")
    for path, each in said.outputs.items():
        if each.files is not None and hashing.folder_digest(each.files) != each.sha256:
            faults.append(
                f"the record of {name} contradicts itself: the sha256 of {path} does not follow from its files"
            )
        if path in rebuild.digests and rebuild.digests[path].sha256 != each.sha256:
            faults.append(f"{path} has another sha256 than the record of {name} says")
    return faults


def check_unchanged_during_run(rebuild: Artifact) -> Finding:
    """Nothing that a stage read changed while it ran."""
    faults = []
    for name, each in rebuild.records.items():
        faults += [
            f"{path} was changed while {name} ran"
            for path, known in sorted(each.inputs.items())
            if known.before != known.after
        ]
        faults += [f"{path} was changed while {name} ran" for path in each.changed_code]
        keys = sorted(
            key
            for key in each.parameters.keys() | each.parameters_after.keys()
            if each.parameters.get(key) != each.parameters_after.get(key)
        )
        faults += [f"{key} in params.yaml was changed while {name} ran" for key in keys]
    if not rebuild.records:
        return Finding(GROUP, "during", SKIP, "no record says what the stages read before they ran")
    return pass_or_fail(
        GROUP,
        "during",
        faults,
        f"{sum(len(each.inputs) for each in rebuild.records.values())} inputs had the same sha256 before and after their stage ran",
    )


def check_stage_links(rebuild: Artifact) -> Finding:
    """What each stage read is what another one recorded to have written."""
    faults, count, unknown = [], 0, []
    for name, each in rebuild.records.items():
        for path, known in each.inputs.items():
            writer = rebuild.writers.get(path)
            if writer and writer in rebuild.records:
                count += 1
                written = rebuild.records[writer].outputs.get(path)
                if written is None or written.sha256 != known.before:
                    faults.append(f"{name} read another {path} than {writer} recorded to have written")
            elif writer:
                unknown.append(f"{path} (of {writer})")
    if not count and not faults:
        return Finding("chain", "stages", SKIP, "no two records are of stages that hand something on")
    return pass_or_fail(
        "chain",
        "stages",
        faults,
        f"{count} inputs are the outputs that another stage recorded"
        + (f"; not recorded: {format_some(sorted(set(unknown)))}" if unknown else ""),
    )
