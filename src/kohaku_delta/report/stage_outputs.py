"""Invariant: a figure that is shown stands in a file that a stage wrote; a file is absent (None), whole, or refused by
name.

Readers of the small outs: inputs.json, dataset.json, held-out.json, curves.csv, bucket.txt. Keys that are not shown are
left alone.
"""

import csv
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kohaku_delta import strict_model
from kohaku_delta.dataset import dataset_statistics
from kohaku_delta.errors import UserError
from kohaku_delta.params import Schedule
from kohaku_delta.strict_model import PartialModel

Count = Annotated[int, Field(ge=0)]
MAX_BYTES = 64 << 20  # of a JSON file
CURVES = ("step", "loss", "gradient_norm", "learning_rate_unet", "learning_rate_text")


class Input(PartialModel):
    url: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Inputs(PartialModel):
    inputs: dict[str, Input | list[Input]]


class Compared(PartialModel):
    published: int
    rebuilt: int
    difference: int


class ComparedBuckets(PartialModel):
    published: int
    equal: int


class Comparison(PartialModel):
    posts: Compared
    steps: Compared
    buckets: ComparedBuckets


class Dataset(PartialModel):
    drawn: Count
    selected: Count
    trained: Count
    dropped: dict[str, Count]
    despite: dict[str, Count]
    micro_batches: Count
    steps: Count
    buckets: Count
    ratings: dict[str, Count]
    quality: dict[str, Count]
    tokens: dict[str, Count]
    published: Comparison | str


class Forms(PartialModel):
    sdxl: float
    training: float


class Loss(PartialModel):
    loss: Forms


class HeldOut(PartialModel):
    posts: Annotated[int, Field(ge=1)]
    base: Loss
    final: Loss


class NothingHeldOut(PartialModel):
    """Of a recipe that trains its whole collection. `reason`: why there is no post to measure on."""

    posts: Literal[0]
    reason: str


def read_output(path: Path, kind):
    """The JSON file at `path` as `kind` (a class above); None where it is not there."""
    try:
        return strict_model.read_json(path, kind, MAX_BYTES, "Delete it and run `dvc repro`.")
    except (FileNotFoundError, NotADirectoryError):
        return None


def curves(path: Path) -> dict[str, list[float]] | None:
    """Column → values, a row a step; None where the file is not there."""
    text = _text(path)
    if text is None:
        return None
    rows = list(csv.DictReader(text.splitlines()))
    try:
        return {name: [float(row[name]) for row in rows] for name in CURVES}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} has no column, or a row without a number, of {', '.join(CURVES)}. Delete it and run the train stage again."
        ) from None


def buckets(path: Path, schedule: Schedule) -> list[list[int]] | None:
    """[width, height, images] of each bucket; None where the file is not there."""
    try:
        return dataset_statistics.bucket_counts(path, schedule)["buckets"]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. Delete it and run the schedule stage again.") from None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. Delete it and run `dvc repro`.") from None
