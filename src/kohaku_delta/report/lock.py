"""Invariant: hashes, sizes and parameters are those that DVC recorded when a stage ran; what the files are now is not asked here.

`read` gives the stages of dvc.yaml, in its order, each with what dvc.lock says of it (nothing, where the stage has not run).
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML, YAMLError

from kohaku_delta.refusal import Refusal

PARAMS = "params.yaml"


class Out(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    path: str = Field(pattern=r"^[^/].*$")
    md5: str = Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")
    size: int = Field(ge=0)
    nfiles: int | None = None

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if ".." in path.split("/"):
            raise ValueError("an out lies in its recipe's folder")
        return path


class Locked(BaseModel):
    model_config = ConfigDict(strict=True)
    params: dict[str, dict] = {}
    outs: list[Out] = []


class Lock(BaseModel):
    stages: dict[str, Locked] = {}


class Declared(BaseModel):
    """A stage of dvc.yaml. An out is a path, or a path with settings."""

    deps: list[str] = []
    outs: list[str | dict[str, object]] = []
    metrics: list[str | dict[str, object]] = []
    plots: list[str | dict[str, object]] = []

    def products(self) -> list[str]:
        return [each if isinstance(each, str) else next(iter(each)) for each in self.outs + self.metrics + self.plots]


class Pipeline(BaseModel):
    stages: dict[str, Declared]


@dataclass(frozen=True)
class Stage:
    name: str
    reads: list[str]  # names of the stages whose outs it declares as dependencies
    products: list[str]
    outs: dict[str, Out]  # path → what the lock says; empty where the stage has not run
    params: dict  # section or dotted key → value, as the lock has them


def read(pipeline: Path, lock: Path) -> list[Stage]:
    """The stages of `pipeline` (a dvc.yaml), in its order, with what `lock` says of them."""
    declared, locked = _load(pipeline, Pipeline).stages, _load(lock, Lock).stages
    maker = {product: name for name, stage in declared.items() for product in stage.products()}
    stages = []
    for name, stage in declared.items():
        entry = locked.get(name, Locked())
        reads = dict.fromkeys(maker[dep] for dep in stage.deps if dep in maker)
        stages.append(Stage(name, list(reads), stage.products(), {out.path: out for out in entry.outs}, entry.params.get(PARAMS, {})))
    return stages


def sections(stages: list[Stage]) -> tuple[dict, list[str]]:
    """The sections of the recipe that stages ran with, and the keys on which two stages disagree: one of them ran before a change."""
    found, torn = {}, {}
    for stage in stages:
        for key, value in stage.params.items():
            if key in found and found[key] != value:
                torn[key] = None
            found[key] = value
    for key in [key for key in found if "." in key]:  # one value of a section, which another stage may hold whole
        value, (section, *names) = found.pop(key), key.split(".")
        whole = found.get(section)
        for name in names:
            whole = whole.get(name) if isinstance(whole, dict) else None
        if section in found and whole != value:
            torn[key] = None
    return found, list(torn)


def _load(path: Path, model):
    try:
        return model.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise Refusal(f"{path} is not there. Name a recipe's folder, and run `dvc repro` in it before asking for its report.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not YAML that can be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Is this a file of DVC? `dvc repro` writes the lock anew.") from None
