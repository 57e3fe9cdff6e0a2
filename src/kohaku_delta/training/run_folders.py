"""The folder of each run, `work/<key>`. A run's states are never given up for those of another run.

<key> is the digest of everything that the run depends on, which depends.json in the folder lists by name. A finished
run stays in its folder. While another run is unfinished, no new one starts, except in DVC's experiments and in CI: its
inputs may have changed by mistake. `kohaku-delta set-aside` renames its folder to <key>.set-aside, and a later training
with that key renames it back. Needs no torch.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from kohaku_delta import atomic_files, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.mappings import differing_keys
from kohaku_delta.printing import format_some, log_above_bar, printable
from kohaku_delta.strict_model import StrictModel

KEY = re.compile(r"[0-9a-f]{16}")
STEP = re.compile(r"^step-(\d{8})$")
DEPENDS = "depends.json"
SET_ASIDE = ".set-aside"
MAX_BYTES = 1 << 20  # of depends.json; the release's has 20 kB
MAX_NAMES, MAX_NAME, MAX_VALUE = 5, 100, 40  # of what differs, in a message


class Dependencies(StrictModel):
    """depends.json. steps: of the whole run; depends: digest or value of each input, parameter, code file, library."""

    steps: Annotated[int, Field(ge=1)]
    depends: dict[str, str]


class UnfinishedRun(NamedTuple):
    folder: Path
    done: int  # steps
    inputs: Dependencies | None  # None if depends.json is missing or cannot be read
    fault: str  # why not

    @property
    def progress(self) -> str:
        return f"{self.done} of {self.inputs.steps if self.inputs else 'an unknown number of'} steps"


def saved_steps(folder: Path) -> list[int]:
    """The numbers of steps after which there is a state in the run's folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in (STEP.match(path.name) for path in folder.iterdir()) if match)


def state_path(folder: Path, step: int) -> Path:
    """The folder of the state after `step` steps."""
    return folder / f"step-{step:08d}"


@contextmanager
def locked(folder: Path, who: str = "training") -> Iterator[None]:
    """Locks a folder, which is made. Raises UserError if another process of this kind has locked it, or if it cannot be
    locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another {who} uses {folder}. Wait for it, stop it, or name another folder with --work."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise UserError(
                f"{folder} is on a file system that cannot lock files ({error.strerror}), so that another {who} "
                "in it would not be noticed. Name a folder on a local disk with --work (or execution.work in "
                "params.yaml), or mount the file system with locks (Lustre: -o flock; NFS: without nolock)."
            ) from None
        yield


def run_key(depends: dict[str, str]) -> str:
    """The name of the folder of the run that depends on these named values."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def run_folder(work: Path, depends: dict[str, str], steps: int, rank: int) -> Path:
    """The folder of the run that depends on these named values; rank 0 makes it, or renames one that was set aside.

    Raises UserError if it is new and `work` holds another run that is unfinished.
    """
    folder = work / run_key(depends)
    aside = set_aside_path(folder)
    if rank:
        return folder if folder.is_dir() or not aside.is_dir() else aside
    if not folder.is_dir() and aside.is_dir():
        os.rename(aside, folder)
        done = max(saved_steps(folder), default=0)
        log_above_bar(f"train: {aside} was set aside and is resumed as {folder}: {done} of {steps} steps are done.")
    if not saved_steps(folder):
        for other in unfinished_runs(work):
            if other.folder != folder:
                _keep_or_refuse(other, folder, depends)
    content = json.dumps({"steps": steps, "depends": depends}, indent=1, sort_keys=True)
    path = folder / DEPENDS
    if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content.encode():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_files.atomic_write(path, "w") as file:
            file.write(content)
    return folder


def _keep_or_refuse(other: UnfinishedRun, folder: Path, depends: dict[str, str]) -> None:
    """Raises UserError, except where nobody would be asked: in an experiment of DVC, and in CI."""
    why = (
        f"with other inputs: {describe_differences(other.inputs.depends, depends)}."
        if other.inputs
        else f"whose inputs are not known: {other.fault}"
    )
    holds = f"{other.folder} holds an unfinished training, {other.progress}, {why}"
    if os.environ.get("DVC_EXP_NAME") or os.environ.get("CI", "").lower() not in ("", "0", "false"):
        log_above_bar(f"train: {holds} It is kept there; this run has a folder of its own, {folder}.")
        return
    restore = "Restore them to go on with it; or set" if other.inputs else "Set"
    raise UserError(
        f"{holds} {restore} it aside with `kohaku-delta set-aside --work {folder.parent}`: it is kept, and a later "
        "training with its inputs takes it up again."
    )


def describe_differences(old: dict[str, str], new: dict[str, str]) -> str:
    """What differs by name, parameters first, with short values as `old → new`; five names at most."""
    names = differing_keys(old, new)
    names.sort(key=lambda name: name.startswith(("code of ", "library ")))

    def describe(name: str) -> str:
        values = (old.get(name, "none"), new.get(name, "none"))
        short = all(len(value) <= MAX_VALUE for value in values)
        name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
        return printable(f"{name}: {values[0]} → {values[1]}" if short else name)

    return format_some(map(describe, names), MAX_NAMES)


def unfinished_runs(work: Path) -> Iterator[UnfinishedRun]:
    """The runs in `work` that have saved steps and are not finished, without those that were set aside."""
    for folder in sorted(work.iterdir()) if work.is_dir() else []:
        done = max(saved_steps(folder), default=0) if KEY.fullmatch(folder.name) else 0
        if not done:
            continue
        try:
            inputs, fault = read_dependencies(folder), ""
        except UserError as error:
            inputs, fault = None, error.message
        if inputs is None or done < inputs.steps:
            yield UnfinishedRun(folder, done, inputs, fault)


def read_dependencies(folder: Path) -> Dependencies:
    """The content of a run's depends.json. Raises UserError if it does not exist or is not one."""
    path = folder / DEPENDS
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a regular file.")
    return strict_model.read_json(path, Dependencies, MAX_BYTES, "No training writes such a file.")


def set_aside(work: Path) -> list[UnfinishedRun]:
    """Rename the folder of each unfinished run in `work`. Returns the runs as they were.

    Raises UserError, and moves nothing, if one of them is being trained or was set aside before under the same name.
    """
    runs = list(unfinished_runs(work))
    with ExitStack() as locks:
        for run in runs:
            if os.path.lexists(target := set_aside_path(run.folder)):
                raise UserError(f"{target} exists already. Move it to another folder; then run this command again.")
            locks.enter_context(locked(run.folder))
        for run in runs:
            os.rename(run.folder, set_aside_path(run.folder))
    return runs


def set_aside_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{SET_ASIDE}")
