"""Invariant: base and final are measured on the same posts, none of which was selected for training, with the same
noise and time steps.

The loss is the plain mean of ‖ε − ε_θ‖² (no min-SNR weight), captions neither shuffled nor dropped.
"""

import pyarrow as pa
import torch

from kohaku_delta.training.batch_builder import BatchBuilder
from kohaku_delta.training.sdxl_model import SDXL, ConditioningForm, Sdxl


def losses_by_form(model: Sdxl, training: ConditioningForm, *data) -> dict[str, float]:
    """The loss in SDXL's own form and in that of the training (equal, and measured once, if they are the same). `data`:
    as for `loss`.
    """
    measured = {}
    for form in dict.fromkeys((SDXL, training)):
        model.set_form(form)
        measured[form] = mean_loss(model, *data)
    model.set_form(SDXL)
    return {"sdxl": measured[SDXL], "training": measured[training]}


@torch.no_grad()
def mean_loss(
    model: Sdxl, source: BatchBuilder, posts: pa.Table, bucket_of: list[tuple[int, int]], batch_size: int
) -> float:
    """The mean over posts; `bucket_of` gives the bucket of each row of `posts`."""
    total, ids = 0.0, posts["post_id"].to_pylist()
    for bucket in sorted(set(bucket_of)):
        rows = [row for row, each in enumerate(bucket_of) if each == bucket]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            total += sum(model.losses(source.batch([ids[row] for row in part], part, bucket)).double().tolist())
    return total / len(ids)
