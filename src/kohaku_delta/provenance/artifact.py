"""A rebuild as the checks see it: recipe, pipeline, lock, records and the outputs that exist, of a recipe's folder or
of a bundle of one.

A bundle holds a recipe's folder without weights, work folder, code and mirror. It adds `bundle.json` (its files,
and the outputs that were left out), `requirements/` (the lock files of the libraries) and `tensors.json` (the digest
of each tensor of the weights that were left out).
"""

import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kohaku_delta import params, paths, regular_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.formats.hashing import Digest
from kohaku_delta.params import Recipe
from kohaku_delta.provenance import bundles, dvc_lock, dvc_yaml, import_closure, stage_record, target_paths
from kohaku_delta.provenance.dvc_lock import LockedStage
from kohaku_delta.provenance.dvc_yaml import StageDeclaration
from kohaku_delta.provenance.import_closure import StageCode
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.yaml_file import read_yaml

MAX_INPUTS = 16 << 20  # bytes of inputs.json; that of the release has 1 MB
REPOSITORY = Path(__file__).resolve().parents[3]  # of the code that runs now


@dataclass
class Artifact:
    """`name` is the path that the user gave; `bundle` the content of bundle.json, None for a recipe's folder."""

    name: str
    folder: Path
    recipe: Recipe
    stages: dict[str, StageDeclaration]
    lock: dict[str, LockedStage]
    bundle: bundles.Bundle | None
    records: dict[str, Record] = field(default_factory=dict)  # by stage, of the runs that dvc.lock describes
    unreadable: dict[str, str] = field(default_factory=dict)  # stage → why its record cannot be read

    @cached_property
    def work(self) -> Path | None:
        """The folder of the saved states; None for a bundle, and for one that is outside the recipe's folder."""
        inside = not self.bundle and target_paths.is_inside(self.recipe.execution.work)
        return self.folder / self.recipe.execution.work if inside else None

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """Output path → digests, of every output that exists; hashed once, on all cores."""
        outs = [out for out in self.writers if (self.folder / out).exists()]
        return dict(zip(outs, hashing.digest_paths(self.folder / out for out in outs), strict=True))

    @cached_property
    def writers(self) -> dict[str, str]:
        """Output path → the stage that writes it."""
        return {out: stage.name for stage in self.stages.values() for out in stage.outs}

    @cached_property
    def values(self) -> dict[str, Any]:
        """The content of params.yaml, as DVC reads it."""
        return read_yaml(self.folder / dvc_yaml.PARAMS)

    @cached_property
    def tensors(self) -> bundles.Tensors:
        """Digests of the tensors of each safetensors output: computed, or those of the bundle's tensors.json."""
        if self.bundle:
            return bundles.read_tensor_digests(self.folder / bundles.TENSORS)
        weights = [out for out in self.writers if out.endswith(bundles.WEIGHTS) and (self.folder / out).is_file()]
        return bundles.digest_weights(self.folder, weights)

    @cached_property
    def code(self) -> dict[str, StageCode]:
        """Stage → the content of build/code/<stage>.json, of the stages that have one. Raises UserError for a file that
        is no such description.
        """
        files = {name: self.folder / paths.CODE / f"{name}.json" for name in self.stages}
        return {name: import_closure.load(path) for name, path in files.items() if path.is_file()}

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """The entries of build/inputs.json, each with its input's name; empty if the file is missing or malformed."""
        return read_inputs(self.folder / paths.INPUTS)

    @cached_property
    def start(self) -> str | None:
        """The sha256 of the LoKr that the training starts from, by inputs.json; None: it starts from scratch."""
        return next((entry["sha256"] for entry in self.inputs if entry["name"] == params.NETWORK_WEIGHTS), None)

    @cached_property
    def commit(self) -> str | None:
        """The commit that all records name; None if they name none or several."""
        commits = {record.revision.commit for record in self.records.values() if record.revision}
        return commits.pop() if len(commits) == 1 else None

    def sha256(self, out: str) -> str | None:
        """The sha256 of an output: of the file if it exists, else as its record says; None if there is neither."""
        if out in self.digests:
            return self.digests[out].sha256
        record = self.records.get(self.writers.get(out, ""))
        return record.outputs[out].sha256 if record and out in record.outputs else None

    def output(self, name: str) -> Path | None:
        """The path of a file under build/; None if it does not exist."""
        path = self.folder / "build" / name
        return path if path.exists() else None


def read_inputs(manifest: Path) -> list[dict[str, Any]]:
    """The entries of an inputs.json, each with its input's name; empty if the file is missing or malformed."""
    try:
        content = json.loads(regular_files.read_regular(manifest, MAX_INPUTS))["inputs"] if manifest.exists() else {}
        entries = [
            {"name": name} | entry
            for name, listed in content.items()
            for entry in (listed if isinstance(listed, list) else [listed])
        ]
        valid = all(
            isinstance(entry.get("bytes"), int)
            and all(isinstance(entry.get(key), str) for key in ("path", "url", "sha256"))
            for entry in entries
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return entries if valid else []


def is_library_locks(dep: str) -> bool:
    """Whether this dependency is the folder with the lock files of the libraries."""
    return posixpath.basename(dep) == "requirements"


@contextmanager
def open_artifact(path: Path) -> Iterator[Artifact]:
    """Opens a recipe's folder (or its build/), or a bundle's folder or tar. Raises UserError for anything else."""
    name = str(path)
    if path.is_file():
        with bundles.unpack_bundle(path) as folder:
            yield _read(name, folder)
        return
    if path.name == "build" and not (path / dvc_yaml.LOCK).exists():
        path = path.parent
    if not path.is_dir():
        found = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {found}. Name a recipe's folder (with dvc.yaml, params.yaml and dvc.lock), or a bundle."
        )
    yield _read(name, path)


RECIPE = (dvc_yaml.PARAMS, dvc_yaml.PIPELINE, dvc_yaml.LOCK, bundles.MANIFEST, bundles.TENSORS, bundles.PROVENANCE)


def _read(name: str, folder: Path) -> Artifact:
    """Nothing is opened before it is known to be inside the folder."""
    own = _is_own(folder)
    lists = (path.name for path in folder.glob("pins-*.csv"))
    target_paths.check_files(folder, [*RECIPE, paths.BUILD, *lists], [paths.BUILD] if own else [])
    rebuild = Artifact(
        name,
        folder,
        params.load(folder / dvc_yaml.PARAMS),
        dvc_yaml.stage_declarations(folder),
        dvc_lock.read_lock(folder / dvc_yaml.LOCK),
        bundles.read_manifest(folder) if (folder / bundles.MANIFEST).exists() else None,
    )
    outs = [*rebuild.writers, *(out.path for stage in rebuild.lock.values() for out in stage.outs)]
    work = [rebuild.recipe.execution.work] if rebuild.work else []
    target_paths.check_files(folder, [*outs, *work], [paths.BUILD, *work] if own else [])
    if rebuild.bundle:
        _ = rebuild.tensors  # a list that contradicts itself is refused before anything is judged by it
    else:
        _check_root(rebuild)
    for stage, locked in rebuild.lock.items():
        path = folder / paths.RECORDS / stage_record.record_filename(stage, locked.key())
        if stage in rebuild.stages and path.is_file():
            try:
                rebuild.records[stage] = stage_record.read_record(path)
            except UserError as error:
                rebuild.unreadable[stage] = error.message.replace(f"{folder}/", "")
    return rebuild


def _is_own(folder: Path) -> bool:
    """Whether this is a recipe's folder in the repository of the code that runs, and not a stranger's."""
    return folder.resolve().is_relative_to(REPOSITORY) and not (folder / bundles.MANIFEST).exists()


def _check_root(rebuild: Artifact) -> None:
    """Raises UserError if `root` in params.yaml is neither a folder around the recipe's nor this code's repository."""
    root = (rebuild.folder / rebuild.recipe.root).resolve()
    if root not in (REPOSITORY, rebuild.folder.resolve(), *rebuild.folder.resolve().parents):
        raise UserError(
            f"{rebuild.folder / dvc_yaml.PARAMS}: root is {rebuild.recipe.root}, which is not a repository around this "
            "recipe's folder. Audit the folder where it was built, or its bundle."
        )
