"""Invariant: a saved state is whole, belongs to one run, and resumes it to the same bytes; no other run ever takes it up.

`work/<key>/step-00000020/` holds state.safetensors (weights, 8-bit optimizer state, scaler) and journal.parquet; <key> is a digest of all that the
run depends on. The folder appears by one rename.
"""

import fcntl
import hashlib
import json
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from kohaku_delta import atomic, table
from kohaku_delta.checkpoint import stream
from kohaku_delta.refusal import Refusal
from kohaku_delta.training.journal import Journal

STEP = re.compile(r"^step-(\d{8})$")


def key(inputs: dict[str, str]) -> str:
    """sha256 of the named digests and of the project's code that is loaded."""
    code = {
        name: hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        for name, module in sys.modules.items()
        if name.split(".")[0] == "kohaku_delta" and getattr(module, "__file__", None)
    }
    return hashlib.sha256(json.dumps([inputs, code], sort_keys=True).encode()).hexdigest()


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
            raise Refusal(f"Another training uses {folder}. Wait for it, stop it, or name another folder with --work.") from None
        yield


def saved(folder: Path) -> list[int]:
    """The steps of the states there, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in (STEP.match(each.name) for each in folder.iterdir()) if match)


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], scale: tuple[float, int], journal: Journal, keep: int) -> None:
    """Writes the state after `step` updates and removes all but the last `keep`."""
    with atomic.folder(folder / f"step-{step:08d}") as aside:
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        arrays["scaler"] = np.array(scale, np.float64)
        stream.save(aside / "state.safetensors", arrays)
        table.write(journal.table(), aside / "journal.parquet")
    for old in saved(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)


def load(folder: Path, step: int, start: str) -> tuple[dict[str, torch.Tensor], tuple[float, int], Journal]:
    """Tensors, (scale, good steps) and the journal of the state after `step` updates."""
    place = folder / f"step-{step:08d}"
    with stream.open_file(place / "state.safetensors") as file:
        arrays = {name: file.read(name) for name in file.specs}
    scale, good_steps = arrays.pop("scaler").tolist()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    rows = table.read(place / "journal.parquet").to_pylist()
    return tensors, (scale, int(good_steps)), Journal(start, rows)
