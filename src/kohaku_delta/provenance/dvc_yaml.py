"""Invariant: what a stage declares is read from the recipe's dvc.yaml, with the names that dvc.lock gives to the same
files.

The one reader of DVC's two files: a dvc.yaml with `${root}` and `${supplied}` filled in from params.yaml, and a
dvc.lock.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.yaml_file import read_yaml

PIPELINE, LOCK, PARAMS = "dvc.yaml", "dvc.lock", "params.yaml"
FIELD = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class StageDeclaration:
    """A stage as dvc.yaml declares it: paths as seen from the recipe's folder; params by dotted key."""

    name: str
    command: str
    params: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]


def stage_declarations(folder: Path) -> dict[str, StageDeclaration]:
    """The stages of the recipe in `folder`, in the order of dvc.yaml."""
    values = read_yaml(folder / PARAMS)
    content = read_yaml(folder / PIPELINE)
    if not isinstance(values, dict) or not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise UserError(
            f"{folder / PIPELINE} has no stages, or {folder / PARAMS} no keys: {folder} is no recipe's folder."
        )

    def filled(text) -> str:
        return FIELD.sub(lambda match: str(values.get(match[1], match[0])), str(text))

    def paths(entries) -> tuple[str, ...]:
        return tuple(
            posixpath.normpath(filled(next(iter(entry)) if isinstance(entry, dict) else entry))
            for entry in entries or []
        )

    found = {}
    for name, stage in content["stages"].items():
        if not isinstance(stage, dict):
            raise UserError(f"{folder / PIPELINE}: the stage {name} is no mapping.")
        outs = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind) or []]
        found[str(name)] = StageDeclaration(
            str(name),
            filled(stage.get("cmd")),
            tuple(map(str, stage.get("params") or [])),
            paths(stage.get("deps")),
            paths(outs),
        )
    return found


def parameters(values: dict, keys: tuple[str, ...]) -> dict:
    """{dotted key: value} of a params.yaml's content, as dvc.lock lists them; a key that is not there is left out."""
    found = {}
    for key in keys:
        value = values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            found[key] = value
    return found
