"""Invariant: a dvc.lock is read whole or refused: what DVC does not write has no place in it."""

import posixpath
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kohaku_delta import strict_model, yaml_file
from kohaku_delta.provenance import dvc_yaml, stage_record
from kohaku_delta.strict_model import StrictModel


class LockedPath(StrictModel):
    path: str
    hash: Literal["md5"]
    md5: stage_record.Md5
    size: stage_record.Count
    nfiles: stage_record.Count | None = None
    isexec: bool | None = None


class LockedStage(StrictModel):
    cmd: str
    deps: list[LockedPath] = []
    params: dict[str, dict] = {}
    outs: list[LockedPath] = []

    @property
    def parameters(self) -> dict:
        return self.params.get(dvc_yaml.PARAMS, {})

    def key(self) -> str:
        """What names this stage's record."""
        return stage_record.record_key(
            self.cmd, {posixpath.normpath(each.path): each.md5 for each in self.deps}, self.parameters
        )


class Lock(StrictModel):
    version: Annotated[Literal["2.0"], Field(alias="schema")]
    stages: dict[str, LockedStage]


def read_lock(path: Path) -> dict[str, LockedStage]:
    """The stages of a dvc.lock, by name."""
    return strict_model.validate(path, Lock, yaml_file.read_yaml(path), "DVC did not write this dvc.lock.").stages
