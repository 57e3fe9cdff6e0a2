"""The checks replay/select, filter, caption, merge, schedule and bake: a stage's own script is run again on what the
rebuild says it read, and must write the same bytes.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kohaku_delta.formats import path_digests
from kohaku_delta.provenance.artifact import REPOSITORY, Artifact
from kohaku_delta.verify.findings import Check, Finding, Skip, check

# stage → the files of build/ that it reads and writes, by option; training is replayed by replay_training, and the
# other stages only show what these wrote
STAGES = {
    "select": ({"inputs": "inputs.json"}, {"out": "selection.parquet"}),
    "filter": (
        {"inputs": "inputs.json", "selection": "selection.parquet"},
        {"out": "posts.parquet", "dropped": "dropped.parquet"},
    ),
    "caption": (
        {"inputs": "inputs.json", "posts": "posts.parquet"},
        {"out": "captions.parquet", "artists": "artists-kxl-delta.json", "characters": "characters-kxl-delta.json"},
    ),
    "merge": ({"inputs": "inputs.json"}, {"out": "delta-base.safetensors"}),
    "schedule": ({"posts": "posts.parquet"}, {"out": "schedule.parquet", "buckets": "bucket.txt"}),
    "bake": (
        {"base": "delta-base.safetensors", "lokr": "delta-lokr.safetensors"},
        {"out": "kohaku-xl-delta.safetensors"},
    ),
}


def replay_stages(rebuild: Artifact, own: Path | None) -> Iterator[Finding]:
    """One finding per stage. own: a recipe's folder that has what a bundle lacks (inputs, base)."""
    for name in STAGES:
        yield check(f"replay/{name}")(replay_stage)(rebuild, name, own or rebuild.folder)


def replay_stage(rebuild: Artifact, name: str, own: Path) -> Check:
    """The stage's script, run into a temporary folder, writes files with the recorded sha256."""
    reads, writes = STAGES[name]
    record = rebuild.records.get(name)
    known = {path: out.sha256 for path, out in record.outputs.items()} if record else {}
    known |= {path: digest.sha256 for path, digest in rebuild.digests.items()}
    expected = {file: known[f"build/{file}"] for file in writes.values() if f"build/{file}" in known}
    if not expected:
        raise Skip("nothing says what it wrote")
    paths = {}
    for option, file in reads.items():
        # the paths in inputs.json are relative to its own folder, so it is read where the inputs are
        folders = [own] if file == "inputs.json" else [rebuild.folder, own]
        paths[option] = next(
            (folder / "build" / file for folder in folders if (folder / "build" / file).is_file()), None
        )
    if missing := [reads[option] for option, path in paths.items() if path is None]:
        raise Skip(f"{', '.join(missing)} does not exist")
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        arguments = [f"--params={(rebuild.folder / 'params.yaml').resolve()}"]
        arguments += [f"--{option}={path.resolve()}" for option, path in paths.items() if path]
        arguments += [f"--{option}={Path(temporary, file)}" for option, file in writes.items()]
        script = REPOSITORY / "stages" / f"{name}.py"
        run = subprocess.run(
            [sys.executable, str(script), *arguments], cwd=temporary, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise Skip(f"could not be computed again: {' '.join(run.stderr.split())[-300:]}")
        for file, sha256 in expected.items():
            if path_digests.digest_path(Path(temporary, file), md5=False).sha256 != sha256:
                yield f"computed again, {file} has other bytes"
    return f"computed again: the same bytes ({', '.join(expected)})"
