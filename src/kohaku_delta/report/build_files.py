"""Readers of the small files of a build: inputs.json, dataset.json, held-out.json, audit.json, curves.csv, bucket.txt.

A file is absent (None), read whole, or refused by name. Keys that the page does not show are ignored.
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kohaku_delta.dataset import dataset_statistics
from kohaku_delta.errors import UserError
from kohaku_delta.params import Schedule

Count = Annotated[int, Field(ge=0)]
CURVES = ("step", "loss", "gradient_norm", "learning_rate_unet", "learning_rate_text")
Content = TypeVar("Content")


class FileModel(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Input(FileModel):
    url: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Inputs(FileModel):
    inputs: dict[str, Input | list[Input]]


class Compared(FileModel):
    published: int
    rebuilt: int
    difference: int


class ComparedBuckets(FileModel):
    published: int
    equal: int


class Comparison(FileModel):
    posts: Compared
    steps: Compared
    buckets: ComparedBuckets


class Dataset(FileModel):
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


class Forms(FileModel):
    sdxl: float
    training: float


class Loss(FileModel):
    loss: Forms


class HeldOut(FileModel):
    posts: Annotated[int, Field(ge=1)]
    base: Loss
    final: Loss


class NothingHeldOut(FileModel):
    """A recipe that trains its whole collection. `reason`: why there is no post to measure on."""

    posts: Literal[0]
    reason: str


class Finding(FileModel):
    group: str
    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    said: str


class Audit(FileModel):
    """What `kohaku-delta audit --json` printed."""

    lock: str | None = None  # sha256 of the dvc.lock that was audited
    findings: list[Finding] = Field(min_length=1)


def read_json(path: Path, kind: TypeAdapter[Content], remedy: str) -> Content | None:
    """The JSON file at `path` as a model above; None if there is no such file."""
    text = _text(path, remedy)
    if text is None:
        return None
    try:
        return kind.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the top level"
        raise UserError(f"{path}: {key}: {first['msg']}. {remedy}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON that can be read. {remedy}") from None


def read_curves(path: Path) -> dict[str, list[float]] | None:
    """curves.csv as column → value per step; None if there is no such file."""
    remedy = "Delete it and run the train stage again."
    text = _text(path, remedy)
    if text is None:
        return None
    rows = list(csv.DictReader(text.splitlines()))
    try:
        return {name: [float(row[name]) for row in rows] for name in CURVES}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} needs the columns {', '.join(CURVES)} with a number in each row. {remedy}") from None


def read_buckets(path: Path, schedule: Schedule) -> list[list[int]] | None:
    """[width, height, images] of each bucket in bucket.txt; None if there is no such file."""
    try:
        return dataset_statistics.bucket_counts(path, schedule)["buckets"]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. Delete it and run the schedule stage again.") from None


def _text(path: Path, remedy: str) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. {remedy}") from None
