"""The reader of dvc.lock. A file with any field that DVC does not write is refused."""

import posixpath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from kohaku_delta import strict_model, yaml_file
from kohaku_delta.provenance import dvc_yaml, stage_record, target_paths
from kohaku_delta.strict_model import StrictModel


class LockedPath(StrictModel):
    """A dependency or an output: its normalised path, seen from the recipe's folder; md5 and size in bytes."""

    path: Annotated[str, AfterValidator(posixpath.normpath)]
    hash: Literal["md5"]
    md5: stage_record.Md5
    size: stage_record.Count
    nfiles: stage_record.Count | None = None
    isexec: bool | None = None


class LockedStage(StrictModel):
    cmd: str
    deps: list[LockedPath] = []
    params: dict[str, dict[str, Any]] = {}
    outs: list[LockedPath] = []

    @property
    def parameters(self) -> dict[str, Any]:
        return self.params.get(dvc_yaml.PARAMS, {})

    def key(self) -> str:
        """The key of this stage's record."""
        return stage_record.record_key(self.cmd, {dep.path: dep.md5 for dep in self.deps}, self.parameters)


class Lock(StrictModel):
    version: Annotated[Literal["2.0"], Field(alias="schema")]
    stages: dict[str, LockedStage]


def read_lock(path: Path) -> dict[str, LockedStage]:
    """The stages of a dvc.lock, by name. Raises UserError and names the field at fault."""
    stages = strict_model.validate(path, Lock, yaml_file.read_yaml(path), "DVC did not write this dvc.lock.").stages
    for name, stage in stages.items():
        target_paths.check_stage(path, name, [out.path for out in stage.outs])
    return stages
