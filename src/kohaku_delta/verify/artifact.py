"""Invariant: a recipe's folder and a bundle of it are seen alike: recipe, pipeline, lock, records, and those outs that
are there.

A bundle holds a recipe's folder without weights, work, code and mirror, and beside it `bundle.json` (what it holds and
what was left out), `requirements/` (the locks of the libraries) and `tensors.json` (the digest of each tensor of what
was left out).
"""

import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kohaku_delta import params as recipes
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.formats.hashing import Digest
from kohaku_delta.params import Recipe
from kohaku_delta.provenance import bundles, dvc_lock, dvc_yaml, import_closure, stage_record
from kohaku_delta.provenance.dvc_lock import LockedStage
from kohaku_delta.provenance.dvc_yaml import StageDeclaration
from kohaku_delta.provenance.import_closure import StageCode
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[3]  # the code at hand


@dataclass
class Artifact:
    """`told`: how the user named it; `bundle`: its bundle.json, None for a recipe's folder."""

    told: str
    folder: Path
    recipe: Recipe
    stages: dict[str, StageDeclaration]
    lock: dict[str, LockedStage]
    bundle: bundles.Bundle | None
    records: dict[str, Record] = field(default_factory=dict)  # of the runs that the lock names, by stage
    unreadable: dict[str, str] = field(default_factory=dict)  # by stage, why its record is none

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """Of every out that is there, by its path; hashed once, on all processors."""
        there = [out for stage in self.stages.values() for out in stage.outs if (self.folder / out).exists()]
        return dict(zip(there, hashing.digest_paths(self.folder / out for out in there)))

    @cached_property
    def writers(self) -> dict[str, str]:
        """out → the stage that writes it."""
        return {out: stage.name for stage in self.stages.values() for out in stage.outs}

    @cached_property
    def values(self) -> dict:
        """The content of params.yaml, as DVC sees it."""
        return read_yaml(self.folder / dvc_yaml.PARAMS)

    @cached_property
    def tensors(self) -> bundles.Tensors:
        """Digest and tensors of each safetensors out: of the file, or as the bundle says."""
        if self.bundle:
            return bundles.read_tensor_digests(self.folder / bundles.TENSORS)
        return bundles.digest_weights(
            self.folder,
            [out for out in self.writers if out.endswith(bundles.WEIGHTS) and (self.folder / out).is_file()],
        )

    @cached_property
    def code(self) -> dict[str, StageCode]:
        """By stage, what build/code says of its code; of the stages whose file is there. Refuses a file that is no such
        description.
        """
        places = {name: self.folder / import_closure.FOLDER / f"{name}.json" for name in self.stages}
        return {name: import_closure.load(place) for name, place in places.items() if place.is_file()}

    def libraries(self, dep: str) -> bool:
        """Whether it is the folder of the locks of the libraries."""
        return posixpath.basename(dep) == "requirements"

    def out(self, name: str) -> Path | None:
        """The place of a file under build/; None where it is not there."""
        path = self.folder / "build" / name
        return path if path.exists() else None


@contextmanager
def open_artifact(path: Path) -> Iterator[Artifact]:
    """What lies at `path`: a recipe's folder (or its build/), a bundle's folder, or a bundle's tar."""
    told = str(path)
    if path.is_file():
        with bundles.unpack_bundle(path) as folder:
            yield _read(told, folder)
        return
    if path.name == "build" and not (path / dvc_yaml.LOCK).exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(
            f"{path} is not there. Name a recipe's folder (with dvc.yaml, params.yaml and dvc.lock), or a bundle."
        )
    yield _read(told, path)


def _read(told: str, folder: Path) -> Artifact:
    bundle = bundles.read_manifest(folder) if (folder / bundles.MANIFEST).exists() else None
    found = Artifact(
        told,
        folder,
        recipes.load(folder / dvc_yaml.PARAMS),
        dvc_yaml.stage_declarations(folder),
        dvc_lock.read_lock(folder / dvc_yaml.LOCK),
        bundle,
    )
    for name, stage in found.lock.items():
        path = folder / stage_record.FOLDER / stage_record.record_filename(name, stage.key())
        if name in found.stages and path.is_file():
            try:
                found.records[name] = stage_record.read_record(path)
            except UserError as refusal:
                found.unreadable[name] = refusal.message.replace(str(folder) + "/", "")
    return found


def commit(rebuild: Artifact) -> str | None:
    """The one commit that the records name; None where they name none or several."""
    named = {each.revision.commit for each in rebuild.records.values() if each.revision}
    return named.pop() if len(named) == 1 else None


def verified_inputs(rebuild: Artifact) -> list[dict]:
    """The verified inputs of inputs.json, one an entry with its name; empty where it is not there, or is no list of
    inputs.
    """
    path = rebuild.out("inputs.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["inputs"] if path else {}
        found = [
            {"name": name} | each
            for name, entry in content.items()
            for each in (entry if isinstance(entry, list) else [entry])
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return (
        found
        if all(
            all(isinstance(each.get(key), str) for key in ("path", "url", "sha256"))
            and isinstance(each.get("bytes"), int)
            for each in found
        )
        else []
    )
