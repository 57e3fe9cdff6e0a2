"""Saved states of two weights and a made-up journal, whole or damaged."""

from pathlib import Path

import torch

from kohaku_delta.training import checkpointing, journal, tensor_fingerprints

HEADER = {"base": "b", "parameters": {"train.seed": 1}}


def save(folder, steps):
    """Save a state of two weights after `steps` steps; returns its tensors."""
    tensors = {
        "weights/a": torch.full((5000,), steps, dtype=torch.float16),
        "weights/b": torch.arange(7.0),
        "optimizer/a.state1": torch.full((5000,), 3, dtype=torch.uint8),
    }
    rows = journal.Journal(HEADER)
    for step in range(steps):
        current = tensors | {"weights/a": torch.full((5000,), step + 1, dtype=torch.float16)}
        weights = tensor_fingerprints.fingerprints(checkpointing.select_prefix(current, "weights/"))
        optimizer = tensor_fingerprints.fingerprints(checkpointing.select_prefix(current, "optimizer/"))
        rows.append(
            {
                "step": step, "visits": "v", "losses": [0.1], "lanes": [2**64 - 1], "gradient_norm": 1.0,
                "learning_rate_unet": 0.0, "learning_rate_text": 0.0, "scale": 8.0,
                "weights": tensor_fingerprints.combine(weights), "optimizer": tensor_fingerprints.combine(optimizer),
                "tensors": tensor_fingerprints.short_fingerprints(weights),
            }
        )  # fmt: skip
    checkpointing.save(folder, steps, tensors, rows, 9, 1000)
    return tensors


def damage(folder: Path, steps: int) -> None:
    """Flip a bit in the middle of the state after `steps` steps."""
    file = checkpointing.state_path(folder, steps) / checkpointing.STATE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
