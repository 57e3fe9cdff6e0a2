"""The pipeline and the code that the auditor knows: those of the checkout that this program runs from, and those of the
commit that the records name, if it is in that checkout's history.

Nothing here is read from a target: neither its dvc.yaml, nor files around it, nor its git repository.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kohaku_delta.provenance import dvc_yaml, import_closure
from kohaku_delta.provenance.artifact import REPOSITORY, Artifact
from kohaku_delta.verify.findings import Skip
from kohaku_delta.yaml_file import read_yaml


@dataclass(frozen=True)
class KnownCode:
    """pipeline: the content of dvc.yaml; files: stage → path in the repository → digest (import_closure)."""

    name: str
    pipeline: Any
    files: dict[str, dict[str, str]]


def known_codes(rebuild: Artifact) -> Iterator[KnownCode]:
    """The code at hand, then that of the commit that all records name, if it is in the history of the code at hand.
    Raises Skip if this program does not run from a checkout.
    """
    if not (REPOSITORY / dvc_yaml.PIPELINE).is_file():
        raise Skip(f"{REPOSITORY} is not a checkout of the code: it has no {dvc_yaml.PIPELINE} to compare with")
    yield _at_hand(REPOSITORY)
    if rebuild.commit and (known := _of_commit(REPOSITORY, rebuild.commit)):
        yield known


def stages_at_hand() -> set[str]:
    """The names of the stages of the pipeline at hand."""
    return set(_at_hand(REPOSITORY).pipeline["stages"])


@cache
def _at_hand(repository: Path) -> KnownCode:
    return _describe(repository, "the code at hand")


def _describe(folder: Path, name: str) -> KnownCode:
    @cache
    def digest(path: Path) -> str:  # most files are code of several stages
        return import_closure.file_digest(path.name, path.read_bytes())

    root = folder.resolve()
    scripts = sorted(path for path in (root / "stages").glob("*.py") if path.stem != "code")
    files = {
        script.stem: {path.relative_to(root).as_posix(): digest(path) for path in import_closure.closure_files(script)}
        for script in scripts
    }
    return KnownCode(name, read_yaml(folder / dvc_yaml.PIPELINE), files)


@cache
def _of_commit(repository: Path, commit: str) -> KnownCode | None:
    """None without git, and for a commit that is not in the history of HEAD: an object that lies there for another
    reason, such as a fetched branch, is not the auditor's code. Only objects that are here are read: git fetches
    nothing.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str, stdin: str = "") -> bytes:
        return subprocess.run(
            ["git", "-C", str(repository), *arguments],
            input=stdin.encode(),
            capture_output=True,
            check=True,
            env=environment | {"GIT_NO_LAZY_FETCH": "1"},
        ).stdout

    try:
        git("merge-base", "--is-ancestor", commit, "HEAD")
        listed = git("ls-tree", "-r", "-z", "--name-only", commit, "--", dvc_yaml.PIPELINE, "src", "stages")
        names = [name for name in listed.decode().split("\0") if name and "\n" not in name]
        output = git("cat-file", "--batch", stdin="".join(f"{commit}:{name}\n" for name in names))
    except (OSError, subprocess.CalledProcessError):
        return None
    position = 0
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        for name in names:  # per file: `<id> blob <size>\n<content>\n`
            header, _, _ = output[position:].partition(b"\n")
            start = position + len(header) + 1
            position = start + int(header.split()[2]) + 1
            target = Path(temporary, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(output[start : position - 1])
        return _describe(Path(temporary), f"commit {commit[:10]}")
