"""The checks lock/bundle, pipeline, parameters, links, outs and weights: dvc.lock against the files that it describes.

DVC itself takes the md5 of an output from dvc.lock without reading the file (`repro --dry --allow-missing`), and hashes
a dependency only after the command ran. These checks read the files.
"""

from kohaku_delta.formats import hashing
from kohaku_delta.provenance import bundles, dvc_yaml
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.provenance.bundles import Bundle
from kohaku_delta.verify.findings import Check, Skip, check, format_some


@check("lock/bundle")
def check_bundle(rebuild: Artifact, bundle: Bundle) -> Check:
    """Each file of a bundle is the one that was packed."""
    paths = {path.relative_to(rebuild.folder).as_posix() for path in rebuild.folder.rglob("*") if path.is_file()}
    paths -= {bundles.MANIFEST}
    for path in sorted(bundle.files.keys() - paths):
        yield f"{path} is listed and is not in the bundle"
    for path in sorted(paths - bundle.files.keys()):
        yield f"{path} is in the bundle and is not listed"
    common = sorted(paths & bundle.files.keys())
    digests = hashing.digest_paths((rebuild.folder / path for path in common), md5=False)
    for path, digest in zip(common, digests, strict=True):
        if digest.sha256 != bundle.files[path]:
            yield f"{path} was changed after it was packed"
    return f"its {len(bundle.files)} files are those that were packed"


@check("lock/pipeline")
def check_pipeline(rebuild: Artifact) -> Check:
    """dvc.lock has the stages, commands, inputs and outputs of dvc.yaml."""
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
    if unfinished:
        raise Skip(f"not finished: dvc.lock has no stage {', '.join(unfinished)}")
    return f"{len(rebuild.lock)} stages with the commands, inputs and outs that dvc.yaml declares"


@check("lock/parameters")
def check_parameters(rebuild: Artifact) -> Check:
    """params.yaml has the values that dvc.lock recorded for each stage."""
    count = 0
    for name, stage in rebuild.stages.items():
        if name in rebuild.lock:
            current, locked = dvc_yaml.parameters(rebuild.values, stage.params), rebuild.lock[name].parameters
            count += len(current)
            for key in sorted(current.keys() | locked.keys()):
                # repr also tells 1 from 1.0 and from true
                if key not in current or key not in locked or repr(current[key]) != repr(locked[key]):
                    yield f"{name}: {key} in params.yaml is not what dvc.lock says"
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
                if (dep.md5, dep.size) != (out.md5, out.size):
                    yield f"{name} read {dep.path} with md5 {dep.md5[:8]}…, {writer} wrote it with {out.md5[:8]}…"
            elif dep.path in rebuild.writers:
                yield f"{name} read {dep.path}, and dvc.lock has no stage {rebuild.writers[dep.path]} that wrote it"
            elif repository_files.setdefault(dep.path, dep.md5) != dep.md5:
                yield f"{name} ran with another {dep.path} than an earlier stage: run `dvc repro` to its end"
    return (
        f"{count} inputs have the hashes that their stages wrote, "
        f"{len(repository_files)} files of the repository one hash each"
    )


def _left_out(rebuild: Artifact) -> set[str]:
    """The outputs that are not in the bundle."""
    return set(rebuild.bundle.left_out) - rebuild.digests.keys() if rebuild.bundle else set()


@check("lock/outs")
def check_outputs(rebuild: Artifact) -> Check:
    """Every output has the md5 and size of dvc.lock."""
    left_out, count = _left_out(rebuild), 0
    for name, stage in rebuild.lock.items():
        for out in stage.outs:
            if digest := rebuild.digests.get(out.path):
                count += 1
                if (digest.md5, digest.bytes) != (out.md5, out.size):
                    yield f"{out.path} (of {name}) has md5 {digest.md5[:8]}…, dvc.lock says {out.md5[:8]}…"
            elif out.path in rebuild.writers and out.path not in left_out:
                yield f"{out.path} (of {name}) does not exist"
    if not count:
        raise Skip("there are no outs")
    total = sum(digest.bytes for digest in rebuild.digests.values())
    return f"{count} outs hashed again, {total:,} bytes: as dvc.lock says"


@check("lock/weights")
def check_left_out(rebuild: Artifact) -> str:
    """Names the outputs that a bundle does not hold, which can therefore not be hashed."""
    outs = [out.path for stage in rebuild.lock.values() for out in stage.outs if out.path in _left_out(rebuild)]
    raise Skip(f"not in the bundle, so only what is recorded about them can be compared: {', '.join(outs)}")
