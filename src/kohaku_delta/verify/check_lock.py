"""The checks lock/bundle, pipeline, parameters, links, outs and weights: dvc.lock against the files that it describes.

DVC itself takes the md5 of an output from dvc.lock without reading the file (`repro --dry --allow-missing`), and hashes
a dependency only after the command ran. These checks read the files.
"""

from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.formats import hashing
from kohaku_delta.formats.hashing import Digest
from kohaku_delta.printing import format_some
from kohaku_delta.provenance import bundles, dvc_yaml, statement
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.provenance.bundles import Bundle
from kohaku_delta.provenance.dvc_lock import LockedPath
from kohaku_delta.verify import known_code
from kohaku_delta.verify.findings import Check, Skip, check
from kohaku_delta.yaml_file import read_yaml


@check("lock/bundle")
def check_bundle(rebuild: Artifact, bundle: Bundle) -> Check:
    """Each file of a bundle is the one that was packed."""
    present = {path.relative_to(rebuild.folder).as_posix() for path in rebuild.folder.rglob("*") if path.is_file()}
    present -= {bundles.MANIFEST}
    for path in sorted(bundle.files.keys() - present):
        yield f"{path} is listed and is not in the bundle"
    for path in sorted(present - bundle.files.keys()):
        yield f"{path} is in the bundle and is not listed"
    places = (*rebuild.writers, paths.RECORDS)
    for path in sorted(present):
        if path.startswith(f"{paths.BUILD}/") and not any(f"{path}/".startswith(f"{place}/") for place in places):
            yield f"{path} is not an output of any stage"
    common = sorted(present & bundle.files.keys())
    digests = hashing.digest_paths((rebuild.folder / path for path in common), md5=False)
    for path, digest in zip(common, digests, strict=True):
        if digest.sha256 != bundle.files[path]:
            yield f"{path} was changed after it was packed"
    return f"its {len(bundle.files)} files are those that were packed"


@check("lock/pipeline")
def check_pipeline(rebuild: Artifact) -> Check:
    """dvc.yaml is the one that the auditor knows, and dvc.lock has its stages, commands, inputs and outputs."""
    found, differences = read_yaml(rebuild.folder / dvc_yaml.PIPELINE), []
    for known in known_code.known_codes(rebuild):
        difference = statement.first_difference(found, known.pipeline)
        if difference is None:
            break
        differences.append(difference)
    else:
        yield (
            f"{differences[0]} in dvc.yaml is not as in the code at hand, nor in a commit of its history that the "
            "records name. Restore dvc.yaml, or audit with a checkout of the commit that was run"
        )
    for name in rebuild.lock.keys() - rebuild.stages.keys():
        yield f"dvc.lock has a stage {name}, which dvc.yaml does not declare"
    unfinished = [name for name in rebuild.stages if name not in rebuild.lock]
    for name in unfinished:
        for out in rebuild.stages[name].outs:
            if (rebuild.folder / out).exists():
                yield f"{out} exists and dvc.lock has no stage {name}"
    for name, stage in rebuild.stages.items():
        if locked := rebuild.lock.get(name):
            if locked.cmd != stage.command:
                yield f"{name}: dvc.lock ran “{locked.cmd}”, dvc.yaml says “{stage.command}”"
            for kind, recorded, declared in (("inputs", locked.deps, stage.deps), ("outs", locked.outs, stage.outs)):
                other = {path.path for path in recorded} ^ set(declared)
                if other or len(recorded) != len(declared):
                    yield f"{name}: dvc.lock and dvc.yaml name other {kind}: {format_some(sorted(other))}"
    build = rebuild.folder / paths.BUILD
    others = sorted({*rebuild.folder.glob("*.dvc"), *build.rglob("*.dvc"), *build.rglob(dvc_yaml.PIPELINE)})
    others_note = f"; not looked at: {format_some(path.name for path in others)}" if others else ""
    if unfinished:
        raise Skip(f"not finished: dvc.lock has no stage {', '.join(unfinished)}")
    return (
        f"{len(rebuild.lock)} stages with the commands, inputs and outs that dvc.yaml declares, "
        f"which is that of {known.name}{others_note}"
    )


@check("lock/parameters")
def check_parameters(rebuild: Artifact) -> Check:
    """params.yaml has the values that dvc.lock recorded for each stage."""
    count = 0
    for name, stage in rebuild.stages.items():
        if name in rebuild.lock:
            if other := rebuild.lock[name].params.keys() - {dvc_yaml.PARAMS}:
                yield f"{name}: dvc.lock has parameters of {format_some(sorted(other))}, which no stage reads"
            current, locked = dvc_yaml.parameters(rebuild.values, stage.params), rebuild.lock[name].parameters
            count += len(current)
            for key in sorted(current.keys() | locked.keys()):
                # repr also tells 1 from 1.0 and from true
                if key not in current or key not in locked or repr(current[key]) != repr(locked[key]):
                    yield f"{name}: {key} in params.yaml is not what dvc.lock says"
    if not count:
        raise Skip("dvc.lock names no parameter")
    return f"{count} sections of params.yaml are as dvc.lock recorded them"


@check("lock/links")
def check_links(rebuild: Artifact) -> Check:
    """Each input has the hash that its stage wrote, and each file of the repository has one hash in all stages. A lock
    that was edited in one place contradicts itself here.
    """
    written = {out.path: (name, out) for name, stage in rebuild.lock.items() for out in stage.outs}
    repository_files: dict[str, str] = {}
    count = 0
    for name, stage in rebuild.lock.items():
        for dep in stage.deps:
            if dep.path in written:
                writer, out = written[dep.path]
                count += 1
                if (dep.md5, dep.size, dep.nfiles) != (out.md5, out.size, out.nfiles):
                    yield f"{name} read {dep.path} with md5 {dep.md5[:8]}…, {writer} wrote it with {out.md5[:8]}…"
            elif dep.path in rebuild.writers:
                yield f"{name} read {dep.path}, and dvc.lock has no stage {rebuild.writers[dep.path]} that wrote it"
            elif repository_files.setdefault(dep.path, dep.md5) != dep.md5:
                yield f"{name} ran with another {dep.path} than an earlier stage: run `dvc repro` to its end"
    if not count:
        raise Skip("dvc.lock names no input that a stage wrote")
    return (
        f"{count} inputs have the hashes that their stages wrote, "
        f"{len(repository_files)} files of the repository one hash each"
    )


def _left_out(rebuild: Artifact) -> set[str]:
    """The outputs that are not in the bundle."""
    return set(rebuild.bundle.left_out) - rebuild.digests.keys() if rebuild.bundle else set()


def may_be_left_out(out: LockedPath) -> bool:
    """Whether `kohaku-delta bundle` leaves out an output: weights, what is large and no table, and an empty folder."""
    is_weights = out.path.endswith(bundles.WEIGHTS) or out.path in (paths.DIFFUSERS, paths.MILESTONES)
    return is_weights or not out.size or (out.size > bundles.MAX_OUTPUT and not out.path.endswith(".parquet"))


def _unhashed_files(folder: Path, digest: Digest) -> list[str]:
    """The files of an output's folder that .dvcignore excludes; a stage writes none."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(files - (digest.files or {}).keys())


@check("lock/outs")
def check_outputs(rebuild: Artifact) -> Check:
    """Every output has the md5, the size and the number of files of dvc.lock."""
    left_out, count = _left_out(rebuild), 0
    for name, stage in rebuild.lock.items():
        for out in stage.outs:
            if digest := rebuild.digests.get(out.path):
                count += 1
                files = None if digest.files is None else len(digest.files)
                if (digest.md5, digest.bytes) != (out.md5, out.size):
                    yield f"{out.path} (of {name}) has md5 {digest.md5[:8]}…, dvc.lock says {out.md5[:8]}…"
                elif files != out.nfiles:
                    yield f"{out.path} (of {name}) has {files} files, dvc.lock says {out.nfiles}"
                for file in _unhashed_files(rebuild.folder / out.path, digest):
                    yield f"{out.path} (of {name}) also holds {file}, which neither DVC nor the audit hashes"
            elif rebuild.bundle and out.path in left_out:
                if not may_be_left_out(out):
                    yield f"{out.path} (of {name}) is not in the bundle, which may leave out weights only"
                elif rebuild.bundle.left_out[out.path] != out.size:
                    yield f"{out.path} (of {name}) has another size in {bundles.MANIFEST} than in dvc.lock"
            elif out.path in rebuild.writers:
                yield f"{out.path} (of {name}) does not exist"
    if unknown := sorted(left_out - {out.path for stage in rebuild.lock.values() for out in stage.outs}):
        yield f"{bundles.MANIFEST} leaves out {format_some(unknown)}, which dvc.lock does not name"
    if not count:
        raise Skip("there are no outs")
    total = sum(digest.bytes for digest in rebuild.digests.values())
    return f"{count} outs hashed again, {total:,} bytes: as dvc.lock says"


@check("lock/weights")
def check_left_out(rebuild: Artifact) -> str:
    """Names the outputs that a bundle does not hold, which can therefore not be hashed."""
    outs = [out.path for stage in rebuild.lock.values() for out in stage.outs if out.path in _left_out(rebuild)]
    raise Skip(f"not in the bundle, so only what is recorded about them can be compared: {', '.join(outs)}")
