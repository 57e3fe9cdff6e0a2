"""Invariant: micro-batches come in the order of training, and what is in them does not depend on the number of worker
processes.

torch's DataLoader reads, decodes and tokenises ahead of the device. It gets a generator of its own, so that torch's
stays untouched.
"""

import signal
from collections.abc import Iterator

import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from kohaku_delta.errors import UserError
from kohaku_delta.training.batch_builder import Batch, BatchBuilder

AHEAD = 4  # micro-batches that a worker holds ready


class ScheduleDataset(Dataset):
    """The micro-batches of a schedule's rows. A refusal is handed over as a value: a worker would wrap it in a
    traceback.
    """

    def __init__(self, source: BatchBuilder, schedule: pa.Table):
        self.source, self.schedule = source, schedule

    def __getitem__(self, row: int) -> Batch | UserError:
        place = self.schedule.slice(row, 1).to_pylist()[0]
        try:
            return self.source.batch(place["posts"], place["visits"], (place["width"], place["height"]))
        except UserError as refusal:
            return refusal


def batches(source: BatchBuilder, schedule: pa.Table, rows: list[int], workers: int) -> Iterator[Batch]:
    """The micro-batch of each of these rows of the schedule, in this order. `workers`: processes that work ahead; 0:
    none.
    """
    ahead = (
        {"prefetch_factor": AHEAD, "worker_init_fn": _ignore_signals, "multiprocessing_context": "fork"}
        if workers
        else {}
    )
    loader = DataLoader(
        ScheduleDataset(source, schedule),
        batch_size=None,
        sampler=rows,
        num_workers=workers,
        generator=torch.Generator(),
        **ahead,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _ignore_signals(worker: int) -> None:
    """A worker goes when its trainer goes: what asks the trainer to stop must not end it in the middle of a step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
