"""A pilot as one row to share: on what it ran, how fast, what came out. docs/hosts.md has the table of known pilots.

Everything is read from what the pilot left: the record of its train stage, the log of its run, dvc.lock. Nothing is
read from the host, which may be another one by now. What nobody measured says so.
"""

import csv
import hashlib
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kohaku_delta import paths, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.params import Recipe
from kohaku_delta.provenance import dvc_lock, dvc_yaml, stage_record
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.report import markdown
from kohaku_delta.strict_model import PartialModel
from kohaku_delta.training import run_folders

GPU_CHECK = "work/bench/gpu-check.json"  # of `make gpu-check`, in the repository's root
MAX_BYTES = 1 << 20  # of gpu-check.json and of log.csv
NOT_MEASURED = "not measured"
NOT_INPUTS = ("code of ", "library ", "numerics ")  # of a run's dependencies: commit, lock and card say these


class _GpuCheck(PartialModel):
    """What `make gpu-check` found; deterministic_cost: the share of time that a deterministic step takes more."""

    card: str
    deterministic_cost: Annotated[float, Field(gt=-1, lt=1000)] | None


def read_pilot(folder: Path, recipe: Recipe, run: Path, replayed: dict[int, str]) -> dict[str, Any]:
    """The report of the pilot in a recipe's folder, as it is written to pilot.json.

    run: the folder of its training in work/; replayed: "equal", or how it differs, of each step computed again. Raises
    UserError if the training did not run here, or if the LoKr is not what its record says.
    """
    record, lokr = _train_record(folder), folder / paths.LOKR
    sha256 = hashing.hash_file(lokr)
    written = record.outputs.get(paths.LOKR)
    if written is None or written.sha256 != sha256:
        raise UserError(f"{lokr} is not what the train stage wrote. Run `dvc repro` again.")
    numerics = record.numerics or {}
    steps = _read_log(run / "log.csv")
    lock = folder / recipe.root / "requirements" / f"{recipe.requirements}.txt"
    card = numerics.get("gpu", record.host.get("processor", ""))
    return {
        "format": "kohaku-delta pilot 1",
        "card": card,
        "architecture": numerics.get("architecture"),
        "multiprocessors": numerics.get("multiprocessors"),
        "ranks": max(ranks for *_, ranks in steps),
        "driver": record.host.get("driver"),
        "torch": numerics.get("torch"),
        "cuda": numerics.get("cuda"),
        "lock_sha256": hashing.hash_file(lock),
        "commit": record.revision.commit if record.revision else None,
        "changed": record.revision.dirty if record.revision else None,
        "container": record.container,
        "inputs_sha256": _inputs_digest(run),
        "tars": [pin.url for pin in recipe.download.pins("tars")],
        "steps": len(steps),
        "seconds_per_step": round(statistics.median(seconds for seconds, *_ in steps), 3),
        "peak_mib": max(peak for _, peak, _ in steps),
        "deterministic_cost": _deterministic_cost(folder / recipe.root / GPU_CHECK, card),
        "replayed": {str(step): result for step, result in replayed.items()},
        "lokr_sha256": sha256,
    }


def markdown_row(pilot: dict[str, Any]) -> str:
    """The pilot as a row of the table in docs/hosts.md."""
    cost, equal = pilot["deterministic_cost"], sum(result == "equal" for result in pilot["replayed"].values())
    kind = f", {pilot['architecture']}, {pilot['multiprocessors']}" if pilot["architecture"] else ""
    cells = [
        f"{pilot['ranks']} × {pilot['card']}{kind}",
        pilot["driver"] or "none",
        f"{pilot['torch'] or 'unknown'}, lock {pilot['lock_sha256'][:8]}",
        (pilot["commit"] or "unknown")[:10] + ("" if pilot["changed"] is False else ", changed"),
        pilot["inputs_sha256"][:8],
        f"{pilot['seconds_per_step']:.2f} s",
        f"{pilot['peak_mib'] / 1024:.2f} GiB",
        NOT_MEASURED if cost is None else f"{cost:+.1%}",
        f"{equal} of {len(pilot['replayed'])} equal",
        pilot["lokr_sha256"],
    ]
    return f"| {' | '.join(map(markdown.to_plain, cells))} |"


def _train_record(folder: Path) -> Record:
    """The record of the training that dvc.lock describes."""
    stage = dvc_lock.read_lock(folder / dvc_yaml.LOCK).get("train")
    path = folder / paths.RECORDS / stage_record.record_filename("train", stage.key()) if stage else None
    if path is None or not path.is_file():
        raise UserError(f"{folder} has no record of its training: it did not run to its end here. Run `dvc repro`.")
    return stage_record.read_record(path)


def _read_log(path: Path) -> list[tuple[float, int, int]]:
    """(seconds, peak MiB, ranks) of each step; of one that was computed again after a stop, the last time counts."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file.read(MAX_BYTES).splitlines()))
        steps = {int(row["step"]): (float(row["seconds"]), int(row["peak_mib"]), int(row["ranks"])) for row in rows}
    except (OSError, KeyError, TypeError, ValueError):
        steps = {}
    if not steps:
        raise UserError(f"{path} does not say how long the steps took. It is written beside the training's states.")
    return list(steps.values())


def _inputs_digest(run: Path) -> str:
    """sha256 of everything that the training depends on besides code, libraries and card: base, posts, captions, order,
    tars, parameters.
    """
    depends = run_folders.read_dependencies(run).depends
    inputs = {name: value for name, value in depends.items() if not name.startswith(NOT_INPUTS)}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _deterministic_cost(path: Path, card: str) -> float | None:
    """What determinism costs on this card, if `make gpu-check` measured it."""
    if not path.is_file():
        return None
    found = strict_model.read_json(path, _GpuCheck, MAX_BYTES, "Run `make gpu-check` again, or remove it.")
    return found.deterministic_cost if found.card == card else None
