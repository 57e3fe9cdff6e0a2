"""Invariant: a stage is called reproduced only if its own script, run on what the build says it read, wrote the same
bytes.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kohaku_delta.formats import hashing
from kohaku_delta.verify.artifact import ROOT, Artifact
from kohaku_delta.verify.findings import FAIL, PASS, SKIP, Finding

# stage → what it reads (option: file of build/) and writes; training is replayed, the others are pictures of these
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


def recompute_findings(rebuild: Artifact, own: Path | None) -> Iterator[Finding]:
    """A finding a stage. `own`: a recipe's folder that has what a bundle has not."""
    for name, (reads, writes) in STAGES.items():
        with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as folder:
            yield _one(rebuild, own or rebuild.folder, name, reads, writes, Path(folder))


def _one(
    rebuild: Artifact, own: Path, name: str, reads: dict[str, str], writes: dict[str, str], folder: Path
) -> Finding:
    theirs = rebuild.folder / "build"
    places = {
        option: next((each / file for each in (theirs, own / "build") if (each / file).is_file()), None)
        for option, file in reads.items()
    }
    if "inputs" in places:
        places["inputs"] = own / "build" / "inputs.json"  # its paths are seen from where it lies
    missing = [reads[option] for option, place in places.items() if place is None or not place.is_file()]
    wanted = {
        file: rebuild.digests[f"build/{file}"].sha256 for file in writes.values() if f"build/{file}" in rebuild.digests
    }
    if recorded := rebuild.records.get(name):
        wanted = {
            file: recorded.outputs[f"build/{file}"].sha256
            for file in writes.values()
            if f"build/{file}" in recorded.outputs
        } | wanted
    if missing or not wanted:
        return Finding(
            "replay", name, SKIP, f"{', '.join(missing)} not there" if missing else "nothing says what it wrote"
        )
    arguments = [
        f"--params={(rebuild.folder / 'params.yaml').resolve()}",
        *(f"--{option}={place.resolve()}" for option, place in places.items()),
    ]
    arguments += [f"--{option}={folder / file}" for option, file in writes.items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "stages" / f"{name}.py"), *arguments], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        return Finding("replay", name, SKIP, f"could not be computed anew: {' '.join(done.stderr.split())[-300:]}")
    other = [file for file, sha256 in wanted.items() if hashing.digest_path(folder / file, md5=False).sha256 != sha256]
    said = (
        f"computed anew, {' and '.join(other)} came out with other bytes"
        if other
        else f"computed anew: the same bytes ({', '.join(wanted)})"
    )
    return Finding("replay", name, FAIL if other else PASS, said)
