"""Training checkpoints: each is complete, belongs to one run, and resumes that run to the same bytes; no other run
loads it.

`work/<key>/step-00000020/` holds state.safetensors (weights, 8-bit optimizer state) and journal.parquet, a folder of
one or two files; run_folders.py says what <key> is. The folder appears by one rename. A state is loaded only if its
tensors have the fingerprints in its journal; one that does not is kept as `step-00000020.damaged`, and the one before
is used.
"""

import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.printing import log_above_bar
from kohaku_delta.training import journal, tensor_fingerprints
from kohaku_delta.training.journal import Journal
from kohaku_delta.training.run_folders import saved_steps, state_path

STATE, JOURNAL = "state.safetensors", "journal.parquet"


class TrainingState(NamedTuple):
    """Everything that training needs to go on after a step."""

    tensors: dict[str, torch.Tensor]  # weights/<name> and optimizer/<name>, on the CPU
    journal: Journal


def format_differing(names: list[str]) -> str:
    """`a, b differ`, with five names at most."""
    return f"{', '.join(names[:5])} {'differs' if len(names) == 1 else 'differ'}"


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], rows: Journal, keep: int, milestone: int) -> None:
    """Write the state after `step` steps, then delete all but the last `keep` and one every `milestone` steps."""
    with atomic_files.atomic_dir(state_path(folder, step)) as temporary:
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        safetensors_io.save(temporary / STATE, arrays)
        rows.write_parts(temporary / JOURNAL, milestone)
    rows.saved = state_path(folder, step) / JOURNAL
    for old in saved_steps(folder)[:-keep]:
        if old % milestone:
            shutil.rmtree(state_path(folder, old), ignore_errors=True)


def load(folder: Path, step: int, header: dict) -> TrainingState:
    """Load and verify the state after `step` steps. Raises UserError if it is another run's or was changed."""
    path = state_path(folder, step)
    rows = journal.read_journal(path / JOURNAL)
    if rows.header != header or len(rows.rows) != step:
        raise UserError(f"{path / JOURNAL} belongs to another run.")
    with safetensors_io.open_file(path / STATE) as file:
        arrays = {name: file.read(name) for name in file.specs}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if fault := fingerprint_mismatch(tensors, rows):
        raise UserError(f"{path / STATE} is not what training saved: after step {step - 1} {fault} had other bits.")
    return TrainingState(tensors, rows)


def load_newest_state(folder: Path, header: dict) -> tuple[int, TrainingState | None]:
    """(steps, the newest state that is sound); (0, None) if there is no state. Newer ones that are damaged are set
    aside. Raises UserError if all are damaged.
    """
    faults: dict[int, str] = {}
    for step in reversed(saved_steps(folder)):
        try:
            state = load(folder, step, header)
        except UserError as error:
            faults[step] = error.message
        else:
            set_damaged_aside(folder, faults)
            return step, state
    if faults:
        raise UserError(no_sound_state(folder, faults))
    return 0, None


def set_damaged_aside(folder: Path, faults: dict[int, str]) -> None:
    """Rename the states after these numbers of steps, and say what is wrong with each."""
    for step, fault in faults.items():
        path = state_path(folder, step)
        damaged = (path.with_name(f"{path.name}.damaged{'' if n == 1 else f'-{n}'}") for n in itertools.count(1))
        target = next(name for name in damaged if not os.path.lexists(name))
        with suppress(FileNotFoundError):  # another rank of this machine has renamed it
            os.rename(path, target)
            log_above_bar(f"train: {fault} It is kept as {target}; an older state is used instead.")


def no_sound_state(folder: Path, faults: dict[int, str]) -> str:
    """The message when every state is damaged: nothing is renamed, and step 0 is not begun without being asked."""
    return (
        f"No saved state in {folder} can be used: {next(iter(faults.values()))} Check the disk and its connection, or "
        "copy a state from another machine or a backup into the folder. To begin at step 0 again, name another folder "
        "with --work (or execution.work in params.yaml)."
    )


def fingerprint_mismatch(tensors: dict[str, torch.Tensor], rows: Journal) -> str | None:
    """Name the part of a state whose fingerprint does not match its journal; None if everything matches."""
    expected = rows.rows[-1]
    weights = tensor_fingerprints.fingerprints(select_prefix(tensors, "weights/"))
    if tensor_fingerprints.combine(weights) != expected["weights"]:
        return ", ".join(differing_weights(weights, expected["tensors"])[:3]) or "a weight"
    optimizer = tensor_fingerprints.fingerprints(select_prefix(tensors, "optimizer/"))
    if tensor_fingerprints.combine(optimizer) != expected["optimizer"]:
        return "the optimizer's state"
    return None


def select_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def differing_weights(weights: dict[str, int], expected: bytes) -> list[str]:
    """The names of the tensors whose short fingerprints are not the expected ones (a journal row's `tensors`)."""
    return [
        name
        for name, ours, theirs in zip(
            sorted(weights), tensor_fingerprints.short_fingerprints(weights), expected, strict=False
        )
        if ours != theirs
    ]
