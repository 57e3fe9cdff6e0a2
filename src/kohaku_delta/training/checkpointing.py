"""Invariant: a saved state is whole, belongs to one run, and resumes it to the same bytes; no other run ever takes it
up.

`work/<key>/step-00000020/` holds state.safetensors (weights, 8-bit optimizer state, scaler) and journal.parquet; <key>
is the digest of all that the run depends on, which depends.json spells out. The folder appears by one rename. A state
is believed only if its tensors have the fingerprints that its journal says.
"""

import fcntl
import hashlib
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.provenance import environment, import_closure
from kohaku_delta.training import journal, tensor_fingerprints
from kohaku_delta.training.journal import Journal

STEP = re.compile(r"^step-(\d{8})$")
DEPENDS, STATE, JOURNAL = "depends.json", "state.safetensors", "journal.parquet"


def loaded_code_digests(lock: str) -> dict[str, str]:
    """The digests of all code and libraries of the training, as the stage `code` writes them. `lock`: cpu or cuda."""
    root = Path(__file__).resolve().parents[3]
    told = import_closure.describe_stage(root / "stages" / "train.py", root / "requirements" / f"{lock}.txt")
    versions = environment.libraries(told.libraries)
    return {f"code of {name}": digest for name, digest in told.files.items()} | {
        f"library {name}": f"{versions[name]} {each.hashes}" for name, each in told.libraries.items()
    }


def run_folder(work: Path, depends: dict[str, str], steps: int, rank: int) -> Path:
    """The folder of the run that depends on these named digests. Refuses to begin anew beside an unfinished training of
    another run.
    """
    folder = work / hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    if rank or (folder / DEPENDS).is_file():
        return folder
    for other in sorted(work.glob(f"*/{DEPENDS}")):
        said = json.loads(other.read_text(encoding="utf-8"))
        done = max(saved_steps(other.parent), default=0)
        if done and done < said["steps"]:
            differing = sorted(
                name
                for name in depends.keys() | said["depends"].keys()
                if depends.get(name) != said["depends"].get(name)
            )
            raise UserError(
                f"{other.parent} holds an unfinished training, {done} of {said['steps']} steps, which this run cannot go on with: {', '.join(differing[:5])} "
                f"{'differs' if len(differing) == 1 else 'differ'}. Restore that to go on; to begin anew delete the folder, or name another one with --work."
            )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files.atomic_write(folder / DEPENDS, "w") as file:
        json.dump({"steps": steps, "depends": depends}, file, indent=1, sort_keys=True)
    return folder


@contextmanager
def locked(folder: Path, rank: int):
    """Rank 0 holds the work folder; a second trainer is refused."""
    if rank:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another training uses {folder}. Wait for it, stop it, or name another folder with --work."
            ) from None
        yield


def saved_steps(folder: Path) -> list[int]:
    """The steps of the states there, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in (STEP.match(each.name) for each in folder.iterdir()) if match)


def state_path(folder: Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return folder / f"step-{step:08d}"


def save(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    scale: tuple[float, int],
    rows: Journal,
    keep: int,
    milestone: int,
) -> None:
    """Writes the state after `step` steps, and removes all but the last `keep` and those of each `milestone` steps."""
    with atomic_files.atomic_dir(state_path(folder, step)) as aside:
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        arrays["scaler"] = np.array(scale, np.float64)
        safetensors_io.save(aside / STATE, arrays)
        rows.write(aside / JOURNAL)
    for old in saved_steps(folder)[:-keep]:
        if old % milestone:
            shutil.rmtree(state_path(folder, old), ignore_errors=True)


def load(folder: Path, step: int, header: dict) -> tuple[dict[str, torch.Tensor], tuple[float, int], Journal]:
    """Tensors, (scale, good steps) and the journal of the state after `step` steps. Refuses tensors that its journal
    does not know.
    """
    here = state_path(folder, step)
    remedy = f"Delete {here}: training then goes on from the state before it."
    rows = journal.read_journal(here / JOURNAL)
    if rows.header != header or len(rows.rows) != step:
        raise UserError(f"{here / JOURNAL} belongs to another run. {remedy}")
    with safetensors_io.open_file(here / STATE) as file:
        arrays = {name: file.read(name) for name in file.specs}
    if "scaler" not in arrays or arrays["scaler"].shape != (2,):
        raise UserError(f"{here / STATE} holds no scaler: it is not what training saved. {remedy}")
    scale, good_steps = arrays.pop("scaler").tolist()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if fault := fingerprint_mismatch(tensors, rows):
        raise UserError(
            f"{here / STATE} is not what training saved: after step {step - 1} {fault} had other bits. {remedy}"
        )
    return tensors, (scale, int(good_steps)), rows


def fingerprint_mismatch(tensors: dict[str, torch.Tensor], rows: Journal) -> str | None:
    """What of a state has not the fingerprints that the last row of its journal says; None when all of it has."""
    weights, said = tensor_fingerprints.fingerprints(select_prefix(tensors, "weights/")), rows.rows[-1]
    if tensor_fingerprints.combine(weights) != said["weights"]:
        return ", ".join(differing_weights(weights, said["tensors"])[:3]) or "a weight"
    if (
        tensor_fingerprints.combine(tensor_fingerprints.fingerprints(select_prefix(tensors, "optimizer/")))
        != said["optimizer"]
    ):
        return "the optimizer's state"
    return None


def select_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def differing_weights(weights: dict[str, int], marks: bytes) -> list[str]:
    """The names of the tensors whose fingerprints are not those of a journal's marks."""
    return [
        name
        for name, ours, theirs in zip(sorted(weights), tensor_fingerprints.short_fingerprints(weights), marks)
        if ours != theirs
    ]
