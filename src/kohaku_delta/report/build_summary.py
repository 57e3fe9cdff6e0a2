"""A build as its dvc.lock and its files describe it, read once; where they or the recipe disagree, that is listed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta import params as recipes
from kohaku_delta import paths, strict_model
from kohaku_delta.hub import inputs_manifest, pins
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.provenance import dvc_yaml, target_paths
from kohaku_delta.provenance.bundles import PROVENANCE
from kohaku_delta.provenance.dvc_lock import LockedPath
from kohaku_delta.report import build_files, stage_status
from kohaku_delta.report.build_files import Audit, Dataset, HeldOut, Input, Inputs, NothingHeldOut
from kohaku_delta.report.stage_status import StageStatus
from kohaku_delta.yaml_file import read_yaml

WEIGHTS = {"base": "delta-base.safetensors", "lokr": "delta-lokr.safetensors", "final": "kohaku-xl-delta.safetensors"}
MISSING = "missing"  # in Build.damaged
RUN_AGAIN = "Run `dvc repro`."


@dataclass(frozen=True)
class InputSource:
    """A downloaded input, and how it fits its pin in the recipe."""

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
    published: str | None  # the release's sha256, if the recipe has one


@dataclass(frozen=True)
class Build:
    recipe: Recipe  # as dvc.lock says that the stages ran; params.yaml for what no stage ran with
    lock_sha256: str
    changed: list[str]  # keys in which params.yaml, or one stage, differs from what stages ran with
    stages: list[StageStatus]
    damaged: dict[str, str]  # output → why the file cannot be the one in dvc.lock
    sources: list[InputSource]
    weights: list[WeightFile]
    dataset: Dataset | None
    held_out: HeldOut | NothingHeldOut | None
    curves: dict[str, list[float]] | None
    milestones: dict[str, list[float]] | None
    buckets: list[list[int]] | None
    audit: Audit | None  # only if it names this very dvc.lock
    other_audit: bool  # an audit that names another dvc.lock, or none
    provenance: str | None  # sha256 of provenance.json
    folder: Path

    @property
    def is_release(self) -> bool:
        """Whether the recipe is the release's: it names what was published."""
        return self.recipe.published is not None

    @property
    def is_miniature(self) -> bool:
        """Whether this is the embedded miniature: trained on the repository's drawn dataset."""
        database = self.recipe.download.inputs.get("database")
        return not self.is_release and isinstance(database, Pin) and database.url == "file://../data/danbooru2023.db"

    @property
    def steps(self) -> int | None:
        """Steps that were trained."""
        return len(self.curves["step"]) if self.curves else None

    def output(self, name: str) -> LockedPath | None:
        """dvc.lock's entry of build/`name`."""
        return next(
            (out for stage in self.stages for out in stage.outs.values() if out.path == f"{paths.BUILD}/{name}"), None
        )


def read_build(place: Path) -> Build:
    """The build of the recipe in the folder `place` (params.yaml, dvc.yaml, dvc.lock, build/)."""
    lock, folder, provenance = place / dvc_yaml.LOCK, place / paths.BUILD, place / PROVENANCE
    target_paths.check_files(place, [dvc_yaml.PARAMS, dvc_yaml.PIPELINE, dvc_yaml.LOCK, PROVENANCE, paths.BUILD])
    stages = stage_status.read_stages(place)
    current = recipes.load(place / dvc_yaml.PARAMS)
    locked, disagreeing = stage_status.merged_parameters(stages)
    recipe = _validate_recipe(read_yaml(place / dvc_yaml.PARAMS) | locked, lock)
    inputs = build_files.read_json(folder / "inputs.json", Inputs, RUN_AGAIN)
    lock_sha256 = hashlib.sha256(lock.read_bytes()).hexdigest()
    audit = build_files.read_json(folder / "audit.json", Audit, "Run `kohaku-delta audit --json` again.")
    outs = [out for stage in stages for out in stage.outs.values()]
    return Build(
        recipe=recipe,
        lock_sha256=lock_sha256,
        changed=sorted(
            {*disagreeing, *_differences(current.model_dump(by_alias=True), recipe.model_dump(by_alias=True))}
        ),
        stages=stages,
        damaged={out.path: fault for out in outs if (fault := _size_fault(place / out.path, out))},
        sources=_sources(inputs, recipe, place) if inputs else [],
        weights=_weights(folder, recipe),
        dataset=build_files.read_json(folder / "dataset.json", Dataset, RUN_AGAIN),
        held_out=build_files.read_json(folder / "held-out.json", HeldOut | NothingHeldOut, RUN_AGAIN),
        curves=build_files.read_curves(folder / "curves.csv"),
        milestones=build_files.read_milestones(folder / "milestones.csv"),
        buckets=build_files.read_buckets(folder / "bucket.txt", recipe.schedule),
        audit=audit if audit and audit.lock == lock_sha256 else None,
        other_audit=audit is not None and audit.lock != lock_sha256,
        provenance=hashlib.sha256(provenance.read_bytes()).hexdigest() if provenance.is_file() else None,
        folder=folder,
    )


def _validate_recipe(sections: dict, lock: Path) -> Recipe:
    remedy = "Run `dvc repro`, or use the code that the build was made with."
    return strict_model.validate(lock, Recipe, sections, remedy)


def _differences(a, b, path: str = "") -> list[str]:
    """The dotted keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {**a, **b}
        return [key for name in keys for key in _differences(a.get(name), b.get(name), f"{path}.{name}".lstrip("."))]
    return [] if a == b else [path]


def _size_fault(path: Path, out: LockedPath) -> str | None:
    if not path.exists():
        return MISSING
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return None if size == out.size else f"has {size:,} bytes"


def _sources(inputs: Inputs, recipe: Recipe, place: Path) -> list[InputSource]:
    sources = []
    for name, entry in inputs.inputs.items():
        expanded = pins.expand_input(name, recipe.download.inputs.get(name, []), place)
        by_url = {pin.url: pin for pin in expanded}
        for each in entry if isinstance(entry, list) else [entry]:
            fit = _pin_status(each, by_url.get(each.url))
            if name == "database" and each.pinned == inputs_manifest.CONVERTED and "posts" in recipe.download.inputs:
                fit = "made of posts by the download stage", True
            sources.append(InputSource(name, each.url, each.bytes, each.sha256, *fit))
    return sources


def _pin_status(entry: Input, pin: Pin | None) -> tuple[str, bool]:
    """How a downloaded input fits its pin, and whether it does."""
    if pin is None:
        return "not in the recipe", False
    if (pin.sha256 and not entry.sha256.startswith(pin.sha256)) or (pin.bytes and entry.bytes != pin.bytes):
        return "differs from its pin", False
    if pin.sha256 is None:
        return "no hash known before: recorded at first download", True
    return "pinned" if len(pin.sha256) == 64 else f"pinned by {len(pin.sha256)} digits", True


def _weights(folder: Path, recipe: Recipe) -> list[WeightFile]:
    weights = []
    for name, file in WEIGHTS.items():
        path = folder / file
        if path.is_file():
            with open(path, "rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            published = getattr(recipe.published, name).sha256 if recipe.published else None
            weights.append(WeightFile(name, file, path.stat().st_size, sha256, published))
    return weights
