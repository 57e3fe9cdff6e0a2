"""Invariant: a dvc.lock is read whole or refused: what DVC does not write has no place in it."""

import posixpath
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kohaku_delta.evidence import pipeline, record
from kohaku_delta.refusal import Refusal


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Place(Section):
    path: str
    hash: Literal["md5"]
    md5: record.Md5
    size: record.Count
    nfiles: record.Count | None = None
    isexec: bool | None = None


class LockedStage(Section):
    cmd: str
    deps: list[Place] = []
    params: dict[str, dict] = {}
    outs: list[Place] = []

    @property
    def parameters(self) -> dict:
        return self.params.get(pipeline.PARAMS, {})

    def key(self) -> str:
        """What names this stage's record."""
        return record.key(self.cmd, {posixpath.normpath(each.path): each.md5 for each in self.deps}, self.parameters)


class Lock(Section):
    version: Annotated[Literal["2.0"], Field(alias="schema")]
    stages: dict[str, LockedStage]


def read(path: Path) -> dict[str, LockedStage]:
    """The stages of a dvc.lock, by name."""
    try:
        return Lock.model_validate(pipeline.document(path)).stages
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        reason = "is not known" if first["type"] == "extra_forbidden" else f"is wrong ({first['msg']})"
        raise Refusal(f"{path} is no dvc.lock: {place} {reason}. It was not written by DVC.") from None
