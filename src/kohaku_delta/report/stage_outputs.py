"""Invariant: a figure that is shown stands in a file that a stage wrote; a file is absent (None), whole, or refused by
name.

Readers of the small outs: inputs.json, dataset.json, held-out.json, curves.csv, bucket.txt. Keys that are not shown are
left alone.
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kohaku_delta.dataset import dataset_statistics
from kohaku_delta.errors import UserError
from kohaku_delta.params import Schedule

Count = Annotated[int, Field(ge=0)]
CURVES = ("step", "loss", "gradient_norm", "learning_rate_unet", "learning_rate_text")


class OutputModel(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Input(OutputModel):
    url: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Inputs(OutputModel):
    inputs: dict[str, Input | list[Input]]


class Compared(OutputModel):
    published: int
    rebuilt: int
    difference: int


class ComparedBuckets(OutputModel):
    published: int
    equal: int


class Comparison(OutputModel):
    posts: Compared
    steps: Compared
    buckets: ComparedBuckets


class Dataset(OutputModel):
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


class Forms(OutputModel):
    sdxl: float
    training: float


class Loss(OutputModel):
    loss: Forms


class HeldOut(OutputModel):
    posts: Annotated[int, Field(ge=1)]
    base: Loss
    final: Loss


class NothingHeldOut(OutputModel):
    """Of a recipe that trains its whole collection. `reason`: why there is no post to measure on."""

    posts: Literal[0]
    reason: str


def read_output(path: Path, kind):
    """The JSON file at `path` as `kind` (a class above); None where it is not there."""
    text = _text(path)
    if text is None:
        return None
    try:
        return TypeAdapter(kind).validate_python(json.loads(text))
    except (ValueError, RecursionError) as error:
        where = ""
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = f" (at {'.'.join(map(str, first['loc'])) or 'its top'}: {first['msg']})"
        raise UserError(f"{path} is not what its stage writes{where}. Delete it and run `dvc repro`.") from None


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
