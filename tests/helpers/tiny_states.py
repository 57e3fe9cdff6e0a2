"""Saved states of two weights and a made-up journal, whole or damaged."""

from pathlib import Path

import torch

from kohaku_delta.training import checkpointing, journal, run_folders, tensor_fingerprints

HEADER = {"base": "b", "parameters": {"train.seed": 1}}


def tensors_after(steps: int) -> dict[str, torch.Tensor]:
    """Two weights and an optimizer's state after `steps` steps."""
    return {
        "weights/a": torch.full((5000,), steps, dtype=torch.float16),
        "weights/b": torch.arange(7.0),
        "optimizer/a.state1": torch.full((5000,), 3, dtype=torch.uint8),
    }


def train(rows: journal.Journal, steps: int) -> dict[str, torch.Tensor]:
    """Append the rows up to `steps` steps to the journal; returns the tensors after them."""
    for step in range(len(rows.rows), steps):
        current = tensors_after(step + 1)
        weights = tensor_fingerprints.fingerprints(checkpointing.select_prefix(current, "weights/"))
        optimizer = tensor_fingerprints.fingerprints(checkpointing.select_prefix(current, "optimizer/"))
        rows.append(
            {
                "step": step, "visits": "v", "losses": [0.125], "lanes": [2**64 - 1], "gradient_norm": 1.0,
                "learning_rate_unet": 0.0, "learning_rate_text": 0.0, "scale": 8.0,
                "weights": tensor_fingerprints.combine(weights), "optimizer": tensor_fingerprints.combine(optimizer),
                "tensors": tensor_fingerprints.short_fingerprints(weights),
            }
        )  # fmt: skip
    return tensors_after(steps)


def save(folder: Path, steps: int, rows: journal.Journal | None = None, milestone: int = 1000):
    """Save a state of two weights after `steps` steps, with the journal of a training or a new one's; returns its
    tensors.
    """
    rows = rows or journal.Journal(HEADER)
    tensors = train(rows, steps)
    checkpointing.save(folder, steps, tensors, rows, 9, milestone)
    return tensors


def damage(folder: Path, steps: int) -> None:
    """Flip a bit in the middle of the state after `steps` steps."""
    file = run_folders.state_path(folder, steps) / checkpointing.STATE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
