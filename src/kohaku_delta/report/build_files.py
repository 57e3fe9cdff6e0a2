"""Readers of the small files of a build: inputs.json, dataset.json, held-out.json, audit.json, curves.csv,
milestones.csv, bucket.txt.

A file is absent (None), read whole, or refused by name. Keys that the page does not show are ignored.
"""

import csv
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kohaku_delta import strict_model
from kohaku_delta.dataset import dataset_statistics
from kohaku_delta.errors import UserError
from kohaku_delta.params import Schedule
from kohaku_delta.regular_files import read_regular
from kohaku_delta.strict_model import PartialModel

Count = Annotated[int, Field(ge=0)]
MAX_BYTES = 64 << 20  # of a JSON file; inputs.json of the release has 1 MB
CURVES = ("step", "loss", "gradient_norm", "learning_rate_unet", "learning_rate_text")
MILESTONES = ("step", "held_out_loss", "held_out_loss_training")


class Input(PartialModel):
    url: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    pinned: str = ""


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
    """A recipe that trains its whole collection. `reason`: why there is no post to measure on."""

    posts: Literal[0]
    reason: str


class Finding(PartialModel):
    group: str
    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    said: str


class Audit(PartialModel):
    """What `kohaku-delta audit --json` printed."""

    lock: str | None = None  # sha256 of the dvc.lock that was audited
    findings: list[Finding] = Field(min_length=1)


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """The JSON file at `path` as a model above; None if there is no such file."""
    try:
        return strict_model.read_json(path, kind, MAX_BYTES, remedy)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_curves(path: Path) -> dict[str, list[float]] | None:
    """curves.csv as column → value per step; None if there is no such file."""
    return _columns(path, CURVES, "Run the train stage again.")


def read_milestones(path: Path) -> dict[str, list[float]] | None:
    """milestones.csv as column → value per milestone, NaN without a held-out post; None if there is no such file."""
    return _columns(path, MILESTONES, "Run the milestones stage again.", empty="nan")


def _columns(path: Path, names: tuple[str, ...], remedy: str, empty: str = "") -> dict[str, list[float]] | None:
    text = _text(path, remedy)
    if text is None:
        return None
    try:
        rows = list(csv.DictReader(text.splitlines()))
        return {name: [float(row[name] or empty) for row in rows] for name in names}
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(f"{path} needs the columns {', '.join(names)} with a number in each row. {remedy}") from None


def read_buckets(path: Path, schedule: Schedule) -> list[list[int]] | None:
    """[width, height, images] of each bucket in bucket.txt; None if there is no such file."""
    try:
        return dataset_statistics.bucket_counts(path, schedule)["buckets"]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. Run the schedule stage again.") from None


def _text(path: Path, remedy: str) -> str | None:
    try:
        return read_regular(path, MAX_BYTES).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text. {remedy}") from None
