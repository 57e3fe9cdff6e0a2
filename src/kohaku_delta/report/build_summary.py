"""Invariant: a build is what its lock says and what its files say; both are read once, and where they or the recipe
disagree, that is told.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta import params as recipes
from kohaku_delta import strict_model
from kohaku_delta.hub import pins
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.report import external_evidence, stage_outputs
from kohaku_delta.report import stage_status as locks
from kohaku_delta.yaml_file import read_yaml

FOLDER = "build"
WEIGHTS = {"base": "delta-base.safetensors", "lokr": "delta-lokr.safetensors", "final": "kohaku-xl-delta.safetensors"}


@dataclass(frozen=True)
class InputSource:
    """An input, and how firmly the recipe holds it."""

    name: str
    url: str
    bytes: int
    sha256: str
    pin: str
    good: bool


@dataclass(frozen=True)
class WeightFile:
    name: str  # key of WEIGHTS
    file: str
    bytes: int
    sha256: str
    published: str | None  # the release's sha256, where the recipe has one


@dataclass(frozen=True)
class Build:
    recipe: Recipe  # as the lock says that the stages ran; as params.yaml says, where none has
    changed: list[str]  # keys in which params.yaml, or one stage, differs from what stages ran with
    stages: list[locks.StageStatus]
    lost: dict[str, str]  # out → why the file that lies there cannot be what the lock names
    sources: list[InputSource]
    weights: list[WeightFile]
    dataset: stage_outputs.Dataset | None
    held_out: stage_outputs.HeldOut | stage_outputs.NothingHeldOut | None
    curves: dict[str, list[float]] | None
    buckets: list[list[int]] | None
    told: external_evidence.ExternalEvidence
    folder: Path

    @property
    def release(self) -> bool:
        """Whether this is the release's recipe: it names what was published."""
        return self.recipe.published is not None

    @property
    def miniature(self) -> bool:
        """Whether this is the embedded miniature: it names nothing published, and is trained on the repository's drawn
        dataset.
        """
        database = self.recipe.download.inputs.get("database")
        return not self.release and isinstance(database, Pin) and database.url == "file://../data/danbooru2023.db"

    def out(self, name: str) -> locks.LockedPath | None:
        """What the lock says of build/`name`."""
        return next((stage.outs[f"{FOLDER}/{name}"] for stage in self.stages if f"{FOLDER}/{name}" in stage.outs), None)


def read_build(place: Path) -> Build:
    """The build of the recipe in the folder `place` (params.yaml, dvc.yaml, dvc.lock, build/)."""
    lock, folder = place / dvc_yaml.LOCK, place / FOLDER
    stages = locks.read_stages(place)
    today = recipes.load(place / dvc_yaml.PARAMS)
    found, torn = locks.merged_parameters(stages)
    recipe = _recipe(read_yaml(place / dvc_yaml.PARAMS) | found, lock)
    listed = stage_outputs.read_output(folder / "inputs.json", stage_outputs.Inputs)
    return Build(
        recipe=recipe,
        changed=sorted({*torn, *_differences(today.model_dump(by_alias=True), recipe.model_dump(by_alias=True))}),
        stages=stages,
        lost={
            out.path: why
            for stage in stages
            for out in stage.outs.values()
            if (why := _size_mismatch(place / out.path, out))
        },
        sources=_sources(listed, recipe, place) if listed else [],
        weights=_weights(folder, recipe),
        dataset=stage_outputs.read_output(folder / "dataset.json", stage_outputs.Dataset),
        held_out=stage_outputs.read_output(
            folder / "held-out.json", stage_outputs.HeldOut | stage_outputs.NothingHeldOut
        ),
        curves=stage_outputs.curves(folder / "curves.csv"),
        buckets=stage_outputs.buckets(folder / "bucket.txt", recipe.schedule),
        told=external_evidence.read_evidence(folder, lock, stages),
        folder=folder,
    )


def _recipe(sections: dict, lock: Path) -> Recipe:
    return strict_model.validate(
        lock, Recipe, sections, "Run `dvc repro`, or use the code that the build was made with."
    )


def _differences(a, b, path: str = "") -> list[str]:
    """Keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            key
            for name in {**a, **b}
            for key in _differences(a.get(name), b.get(name), f"{path}.{name}" if path else str(name))
        ]
    return [] if a == b else [path]


def _size_mismatch(path: Path, out: locks.LockedPath) -> str | None:
    if not path.exists():
        return "not at hand"
    size = (
        sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) if path.is_dir() else path.stat().st_size
    )
    return None if size == out.size else f"here are {size:,} bytes"


def _sources(listed: stage_outputs.Inputs, recipe: Recipe, place: Path) -> list[InputSource]:
    pinned = {
        name: [
            each
            for pin in (pin if isinstance(pin, list) else [pin])
            for each in pins.expand_span(pin, pins.pin_list_path(place, name))
        ]
        for name, pin in recipe.download.inputs.items()
    }
    found = []
    for name, entries in listed.inputs.items():
        of = {pin.url: pin for pin in pinned.get(name, [])}
        for entry in entries if isinstance(entries, list) else [entries]:
            found.append(
                InputSource(name, entry.url, entry.bytes, entry.sha256, *_pin_status(entry, of.get(entry.url)))
            )
    return found


def _pin_status(entry: stage_outputs.Input, pin: Pin | None) -> tuple[str, bool]:
    """How the recipe's pin holds what was downloaded, and whether it does."""
    if pin is None:
        return "not in the recipe", False
    if (pin.sha256 and not entry.sha256.startswith(pin.sha256)) or (pin.bytes and entry.bytes != pin.bytes):
        return "differs from its pin", False
    if pin.sha256 is None:
        return "no hash known before: recorded at first download", True
    return "pinned" if len(pin.sha256) == 64 else f"pinned by {len(pin.sha256)} digits", True


def _weights(folder: Path, recipe: Recipe) -> list[WeightFile]:
    found = []
    for name, file in WEIGHTS.items():
        path = folder / file
        if path.is_file():
            with open(path, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            published = getattr(recipe.published, name).sha256 if recipe.published else None
            found.append(WeightFile(name, file, path.stat().st_size, digest, published))
    return found
