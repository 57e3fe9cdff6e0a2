"""The reader of dvc.yaml: what each stage declares, with the paths and parameter keys that dvc.lock has for it.

`${root}` and the other fields are filled in from params.yaml, as DVC does.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.provenance import target_paths
from kohaku_delta.strict_model import PartialModel
from kohaku_delta.yaml_file import read_yaml

PIPELINE, LOCK, PARAMS = "dvc.yaml", "dvc.lock", "params.yaml"
FIELD = re.compile(r"\$\{(\w+)\}")

Entries = list[str | dict[str, dict[str, Any]]]  # a path, or one path with its settings


@dataclass(frozen=True)
class StageDeclaration:
    """A stage as dvc.yaml declares it: normalised paths, seen from the recipe's folder; params by dotted key."""

    name: str
    command: str
    params: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]


class _Stage(PartialModel):
    cmd: str
    params: list[str] = []
    deps: Entries = []
    outs: Entries = []
    metrics: Entries = []
    plots: Entries = []


class _Pipeline(PartialModel):
    stages: dict[str, _Stage]


def entry_paths(entries: Entries) -> list[str]:
    """The paths of the entries of a stage's deps, outs, metrics or plots."""
    return [path for entry in entries for path in (entry if isinstance(entry, dict) else [entry])]


def stage_declarations(folder: Path) -> dict[str, StageDeclaration]:
    """The stages of the recipe in `folder`, in the order of dvc.yaml. Raises UserError for a folder without recipe."""
    values = read_yaml(folder / PARAMS)
    if not isinstance(values, dict):
        raise UserError(f"{folder / PARAMS} has no keys. Name a recipe's folder.")
    pipeline = strict_model.validate(folder / PIPELINE, _Pipeline, read_yaml(folder / PIPELINE))

    def fill(text: str) -> str:
        return FIELD.sub(lambda match: str(values.get(match[1], match[0])), text)

    def paths(*lists: Entries) -> tuple[str, ...]:
        return tuple(posixpath.normpath(fill(path)) for entries in lists for path in entry_paths(entries))

    stages = {
        name: StageDeclaration(
            name, fill(stage.cmd), tuple(stage.params), paths(stage.deps), paths(stage.outs, stage.metrics, stage.plots)
        )
        for name, stage in pipeline.stages.items()
    }
    for name, declared in stages.items():
        target_paths.check_stage(folder / PIPELINE, name, declared.outs)
    return stages


def parameters(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """{dotted key: value} of the content of params.yaml, as dvc.lock lists them; keys that it lacks are left out."""
    found = {}
    for key in keys:
        value: Any = values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            found[key] = value
    return found
