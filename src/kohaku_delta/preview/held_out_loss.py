"""The loss on posts that were not selected for training, with the same noise and time steps for every model.

It is the plain mean of ‖ε − ε_θ‖² (no min-SNR weight), with captions neither shuffled nor dropped.
"""

import pyarrow as pa
import torch

from kohaku_delta.training.batch_builder import BatchBuilder
from kohaku_delta.training.sdxl_model import SDXL, ConditioningForm, Sdxl


def losses_by_form(model: Sdxl, training: ConditioningForm, *data) -> dict[str, float]:
    """The loss in SDXL's own conditioning form and in that of the training; measured once if they are the same.
    `data`: as for `mean_loss`.
    """
    losses = {}
    for form in dict.fromkeys((SDXL, training)):
        model.set_form(form)
        losses[form] = mean_loss(model, *data)
    model.set_form(SDXL)
    return {"sdxl": losses[SDXL], "training": losses[training]}


@torch.no_grad()
def mean_loss(
    model: Sdxl, batches: BatchBuilder, posts: pa.Table, bucket_of: list[tuple[int, int]], batch_size: int
) -> float:
    """The mean over posts; `bucket_of`: (width, height) of the bucket of each row of `posts`."""
    total, ids = 0.0, posts["post_id"].to_pylist()
    for bucket in sorted(set(bucket_of)):
        rows = [row for row, other in enumerate(bucket_of) if other == bucket]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = batches.batch([ids[row] for row in part], part, bucket)
            total += sum(model.losses(batch).double().tolist())
    return total / len(ids)
