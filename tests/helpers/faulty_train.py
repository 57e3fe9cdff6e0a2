"""The stage train with one fault, a script as the stage is: FAULT=name,rank,where,call. It comes in the trainer's step
number `call`, or in a worker's micro-batch number `call`.
"""

import importlib.util
import itertools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "src")

from kohaku_delta import numerics  # noqa: E402

numerics.prepare()

import torch  # noqa: E402

from kohaku_delta.errors import UserError  # noqa: E402
from kohaku_delta.training import batch_builder, rank_processes, training_loop  # noqa: E402

NAME, RANK, WHERE, CALL = os.environ["FAULT"].split(",")
RAISED = {
    "picture": UserError("Post 7 in data-0000.tar cannot be decoded."),
    "exception": KeyError("a fault of the program"),
    "gpu-memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.44 GiB. GPU 0 has 23 GiB"),
    "host-memory": MemoryError("Unable to allocate 3.00 GiB"),
    "read-error": OSError(5, "Input/output error", "data-0000.tar"),
}


def fail() -> None:
    if NAME == "segmentation-fault":
        import ctypes

        ctypes.string_at(0)
    raise RAISED[NAME]


def faulty(function):
    """The function, failing in its call number CALL, counted from 0, and in later ones."""
    calls = itertools.count()

    def call(*arguments):
        if next(calls) >= int(CALL):
            fail()
        return function(*arguments)

    return call


if os.environ.get("RANK", "0") == RANK:
    if WHERE == "trainer":
        training_loop.TrainingLoop.gradient = faulty(training_loop.TrainingLoop.gradient)
    else:
        batch_builder.BatchBuilder.batch = faulty(batch_builder.BatchBuilder.batch)

specification = importlib.util.spec_from_file_location("train_stage", ROOT / "stages" / "train.py")
stage = importlib.util.module_from_spec(specification)
specification.loader.exec_module(stage)

if __name__ == "__main__":
    rank_processes.run(stage.main)
