"""The checks lock/records, unrecorded, during, revision, sandbox, provenance and chain/stages: the records that
stages left when they ran.

A record counts as that of the run that dvc.lock describes only if every hash in it agrees.
"""

from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.formats import hashing
from kohaku_delta.mappings import differing_keys
from kohaku_delta.printing import format_some
from kohaku_delta.provenance import bundles, stage_record, statement
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.verify.findings import FAIL, SKIP, Check, Finding, Skip, check

CONFINED = "audit hook"  # how the sandbox begins to describe itself
COMPUTING = ("train", "preview", "milestones")  # stages that enforce the numerics contract


@check("lock/records")
def check_records(rebuild: Artifact) -> Check:
    """Each record has the command, inputs, parameters and outputs of dvc.lock, and the sha256 of the outputs here."""
    yield from rebuild.unreadable.values()
    for name, record in rebuild.records.items():
        yield from _record_faults(rebuild, name, record)
    if rebuild.bundle:
        expected = {stage_record.record_filename(name, stage.key()) for name, stage in rebuild.lock.items()}
        for path in sorted((rebuild.folder / paths.RECORDS).glob("*")):
            if path.name not in expected:
                yield f"{path.name} is the record of another run: dvc.lock has no stage with that key"
    if not rebuild.records:
        raise Skip("no stage left a record")
    outs = sum(path in rebuild.digests for record in rebuild.records.values() for path in record.outputs)
    if not outs:
        raise Skip(
            f"{len(rebuild.records)} records are of the runs that dvc.lock names; none of their outs exists here"
        )
    return (
        f"{len(rebuild.records)} records are of the runs that dvc.lock names; "
        f"{outs} of their outs have the recorded sha256"
    )


def _record_faults(rebuild: Artifact, name: str, record: Record) -> list[str]:
    locked = rebuild.lock[name]
    other_run = f"the record of {name} is of another run: it"
    if record.stage != name or record.command != locked.cmd:
        return [f"{other_run} ran {record.stage}, “{record.command}”"]
    faults = []
    for verb, recorded, declared in (("read", record.inputs, locked.deps), ("wrote", record.outputs, locked.outs)):
        listed = {path.path: path for path in declared}
        for path in sorted(listed.keys() | recorded.keys()):
            if path not in recorded:
                faults.append(f"the record of {name} does not name {path}")
            elif path not in listed:
                faults.append(f"the record of {name} {verb} also {path}")
            elif (recorded[path].md5, recorded[path].bytes) != (listed[path].md5, listed[path].size):
                md5s = f"{recorded[path].md5[:8]}…, dvc.lock says {listed[path].md5[:8]}…"
                faults.append(f"{other_run} {verb} {path} with md5 {md5s}")
    md5s_read = {path: read.md5 for path, read in record.inputs.items()}
    if not faults and stage_record.record_key(record.command, md5s_read, record.parameters_after) != locked.key():
        faults.append(f"{other_run} had other parameters than dvc.lock")
    for path, out in record.outputs.items():
        if out.files is not None and hashing.folder_digest(out.files) != out.sha256:
            faults.append(f"the record of {name} contradicts itself: the sha256 of {path} is not that of its files")
        if path in rebuild.digests and rebuild.digests[path].sha256 != out.sha256:
            faults.append(f"{path} has another sha256 than the record of {name} says")
    return faults


@check("lock/unrecorded")
def check_unrecorded(rebuild: Artifact) -> str:
    """Names the stages without a record."""
    missing = [name for name in rebuild.lock if name not in rebuild.records and name not in rebuild.unreadable]
    if missing:
        left = {path.name.rpartition("-")[0] for path in (rebuild.folder / paths.RECORDS).glob("*-*.json")}
        others = [name for name in missing if name in left]
        raise Skip(
            f"no record of {', '.join(missing)}: restored from DVC's cache, or run elsewhere"
            + (f"; the records of {', '.join(others)} in that folder are of other runs" if others else "")
        )
    return "every stage has a record"


@check("lock/during")
def check_unchanged_during_run(rebuild: Artifact) -> Check:
    """Nothing that a stage read was changed while it ran."""
    for name, record in rebuild.records.items():
        changed = [path for path, read in sorted(record.inputs.items()) if read.before != read.after]
        changed += record.changed_code
        changed += [f"{key} in params.yaml" for key in differing_keys(record.parameters, record.parameters_after)]
        for what in changed:
            yield f"{what} was changed while {name} ran"
    if not rebuild.records:
        raise Skip("no record says what the stages read before they ran")
    count = sum(len(record.inputs) for record in rebuild.records.values())
    return f"{count} inputs had the same sha256 before and after their stage ran"


@check("lock/revision")
def check_revision(rebuild: Artifact, code: Finding) -> Check:
    """All stages ran at one commit, with its files; otherwise lock/code must not fail. code: the finding of lock/code,
    which compares every file that a stage runs.
    """
    revisions = {name: record.revision for name, record in rebuild.records.items()}
    known = {name: revision for name, revision in revisions.items() if revision}
    if not known:
        raise Skip("no record names a commit")
    commits = sorted({revision.commit for revision in known.values()})
    dirty = [name for name, revision in known.items() if revision.dirty]
    parts = [f"{len(commits)} commits ({format_some(commit[:10] for commit in commits)})"] if len(commits) > 1 else []
    parts += [f"{format_some(dirty)} with files that were not committed"] if dirty else []
    if unknown := [name for name in revisions if name not in known]:
        parts.append(f"{format_some(unknown)} without a commit")
    if not parts:
        return f"all {len(known)} recorded stages ran at commit {commits[0][:10]}, with its files"
    sentence = f"the stages ran at {', '.join(parts)}" if len(commits) > 1 else f"run: {', '.join(parts)}"
    if code.status == SKIP:
        raise Skip(f"{sentence}; and lock/code could not look at what was run")
    if code.status == FAIL:
        yield f"{sentence}; and the code is not that at hand (lock/code)"
    return f"{sentence}; the files of code that they ran are known all the same (lock/code)"


@check("lock/sandbox")
def check_confinement(rebuild: Artifact) -> Check:
    """Each stage ran in the sandbox, and those that compute with torch under the numerics contract."""
    if not rebuild.records:
        raise Skip("no record says how the stages ran")
    layers: dict[str, list[str]] = {}
    for name, record in rebuild.records.items():
        if not (record.confined or "").startswith(CONFINED):
            yield f"{name} was not confined: {record.confined or 'its record says nothing'}"
        layers.setdefault(record.confined or "nothing", []).append(name)
        if name in COMPUTING and not record.numerics:
            yield f"the record of {name} does not say what its numbers were computed with"
        elif record.numerics and record.numerics.get("torch") != record.libraries.get("torch"):
            yield f"the record of {name} contradicts itself: it computed with another torch than was installed"
        if not record.host or record.times.began > record.times.ended:
            yield f"the record of {name} has no host, or ended before it began"
    if len(layers) == 1:
        return f"all {len(rebuild.records)} recorded stages: {next(iter(layers))}"
    return "; ".join(f"{format_some(stages)}: {layer}" for layer, stages in layers.items())


@check("lock/provenance")
def check_signature(rebuild: Artifact, key: Path | None) -> Check:
    """The signature of the public key `key` holds, and the signed statement is that of the files at hand."""
    if key is None:
        signed = (rebuild.folder / bundles.PROVENANCE).is_file()
        raise Skip("signed, but without --key nothing in it is trusted" if signed else "not signed")
    if difference := statement.signed_difference(rebuild, key):
        yield f"{bundles.PROVENANCE}: {difference} was signed with another value than the files here give"
    return f"signed by the key of {key}, {len(rebuild.records)} stages, and every file here is as it was signed"


@check("chain/stages")
def check_stage_links(rebuild: Artifact) -> Check:
    """What each stage read is what another stage recorded as its output."""
    count, unrecorded = 0, set()
    for name, record in rebuild.records.items():
        for path, read in record.inputs.items():
            writer = rebuild.writers.get(path)
            if writer in rebuild.records:
                count += 1
                written = rebuild.records[writer].outputs.get(path)
                if written is None or written.sha256 != read.before:
                    yield f"{name} read another {path} than {writer} recorded as its output"
            elif writer:
                unrecorded.add(f"{path} (of {writer})")
    if not count:
        raise Skip("no two records are of stages of which one reads the other's output")
    return f"{count} inputs are the outputs that another stage recorded" + (
        f"; not recorded: {format_some(sorted(unrecorded))}" if unrecorded else ""
    )
