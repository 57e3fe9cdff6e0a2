"""Measures the milestones of a training that is under way, beside it: same posts, prompts and seeds as the stage
`milestones`.

It reads `work/<key>/` and what the stages before the training wrote, takes no lock of the training, and writes into
`work/<key>/watch/` alone. There each measured model has a folder, which is kept until another LoKr, base or setting is
measured; so a later call measures new milestones only. Milestones appear by one rename: none is read half-written.
"""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from kohaku_delta import atomic_files, paths, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.params import Recipe
from kohaku_delta.preview import checkpoint_measurement, measurement_files, milestones
from kohaku_delta.preview.measurement_files import Measurement
from kohaku_delta.strict_model import StrictModel
from kohaku_delta.training import run_folders
from kohaku_delta.weights import lokr_format

MILESTONE = re.compile(re.escape(paths.milestone_name(0)).replace("0" * 8, r"(\d{8})"))
FOLDER, MEASURED, MAX_BYTES = "watch", "measured.json", 1 << 16
SECTIONS = {"caption", "filter", "model", "preview", "schedule", "train"}  # of the recipe, which decide a measurement


class Run(NamedTuple):
    """A training in the work folder: how many of its steps are saved, and when it last wrote (seconds, for sorting)."""

    folder: Path
    done: int
    steps: int
    time: float


class Measured(StrictModel):
    """measured.json. key: digest of everything that the measurement depends on."""

    key: str
    losses: dict[str, float] | None


def find_runs(work: Path) -> list[Run]:
    """The trainings in a work folder: unfinished ones first, the newest first among them. Raises UserError if there is
    none.
    """
    runs = []
    for depends in work.glob(f"*/{run_folders.DEPENDS}"):
        steps = run_folders.read_dependencies(depends.parent).steps
        done = max(run_folders.saved_steps(depends.parent), default=0)
        times = [path.stat().st_mtime for path in (depends, depends.parent / "log.csv") if path.exists()]
        runs.append(Run(depends.parent, done, steps, max(times)))
    if not runs:
        raise UserError(f"{work} holds no training. Start one (`dvc repro`), or name its work folder with --work.")
    return sorted(runs, key=lambda run: (run.done >= run.steps, -run.time))


def find_milestones(folder: Path) -> dict[int, Path]:
    """The milestones' LoKr files of a run, by their number of steps, ascending."""
    names = sorted(path.name for path in folder.iterdir())
    return {int(match[1]): folder / match[0] for match in map(MILESTONE.fullmatch, names) if match}


def watch(recipe: Recipe, files: dict[str, Path], run: Path) -> tuple[dict[int, Measurement], list[int]]:
    """Measures the base and the milestones of a run that were not measured before, and writes milestones.csv and
    milestones.png into run/watch. Returns all measurements by step, and the steps that were measured now.
    """
    lokrs, folder = find_milestones(run), run / FOLDER
    with run_folders.locked(folder, "`kohaku-delta watch`"):
        settings = recipe.model_dump(mode="json", include=SECTIONS) | {"scale": recipe.bake.scale}
        measured, new, data = {}, [], None
        for step, lokr in tqdm([(0, None), *lokrs.items()], desc="watch", unit="model", disable=None):
            key = _key(settings, files["base"], lokr)
            cached = _read(folder / f"step-{step:08d}", key, len(recipe.preview.prompts))
            if cached is None:
                data = data or checkpoint_measurement.read_held_out_data(recipe, files)
                if lokr:
                    milestones.require_step(lokr, step)
                    cached = milestones.measure_lokr(recipe, data, files["base"], lokr, folder / "model")
                else:
                    cached = checkpoint_measurement.measure_checkpoint(recipe, data, files["base"])
                _write(folder / f"step-{step:08d}", key, cached)
                new.append(step)
            measured[step] = cached
        measurement_files.write_curve(folder / Path(paths.MILESTONES_CSV).name, measured)
        measurement_files.write_grid(folder / Path(paths.MILESTONES_PNG).name, recipe.preview.prompts, measured)
    return measured, new


def _key(settings: dict, base: Path, lokr: Path | None) -> str:
    """Digest of the settings, of the base by size and time, and of the tensors of a LoKr."""
    status = base.stat()
    content = None
    if lokr:
        with safetensors_io.open_file(lokr) as file:
            content = file.metadata.get(lokr_format.CONTENT_HASH)
    known = [settings, status.st_size, status.st_mtime_ns, content]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, key: str, prompts: int) -> Measurement | None:
    """An earlier measurement; None if there is none of this key."""
    with suppress(UserError, OSError, ValueError, SyntaxError):
        found = strict_model.read_json(folder / MEASURED, Measured, MAX_BYTES, "")
        if found.key == key:
            pictures = []
            for number in range(prompts):
                with Image.open(folder / f"prompt-{number}.png", formats=["PNG"]) as image:
                    pictures.append(np.asarray(image.convert("RGB")))
            return Measurement(pictures, found.losses)
    return None


def _write(folder: Path, key: str, measured: Measurement) -> None:
    with atomic_files.atomic_dir(folder) as temporary:
        for number, picture in enumerate(measured.pictures):
            Image.fromarray(picture).save(temporary / f"prompt-{number}.png")
        (temporary / MEASURED).write_text(json.dumps({"key": key, "losses": measured.losses}), encoding="utf-8")
