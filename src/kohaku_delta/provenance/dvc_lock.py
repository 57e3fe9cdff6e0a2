"""The reader of dvc.lock: a file with any field that DVC does not write is refused."""

import posixpath
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kohaku_delta.errors import UserError
from kohaku_delta.provenance import dvc_yaml, stage_record


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
    params: dict[str, dict] = {}
    outs: list[LockedPath] = []

    @property
    def parameters(self) -> dict:
        return self.params.get(dvc_yaml.PARAMS, {})

    def key(self) -> str:
        """The key of this stage's record."""
        return stage_record.record_key(self.cmd, {dep.path: dep.md5 for dep in self.deps}, self.parameters)


class Lock(StrictModel):
    version: Annotated[Literal["2.0"], Field(alias="schema")]
    stages: dict[str, LockedStage]


def read_lock(path: Path) -> dict[str, LockedStage]:
    """The stages of a dvc.lock, by name. Raises UserError and names the field at fault."""
    try:
        return Lock.model_validate(dvc_yaml.read_pipeline(path)).stages
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        reason = "is not known" if first["type"] == "extra_forbidden" else f"is wrong ({first['msg']})"
        raise UserError(f"{path} is not a dvc.lock: {place} {reason}. DVC did not write it.") from None
