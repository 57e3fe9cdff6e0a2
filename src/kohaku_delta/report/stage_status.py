"""Invariant: hashes, sizes and parameters are those that DVC recorded when a stage ran; what the files are now is not
asked here.

`read` gives the stages of dvc.yaml, in its order, each with what dvc.lock says of it (nothing, where the stage has not
run).
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kohaku_delta.errors import UserError
from kohaku_delta.provenance import dvc_lock, dvc_yaml
from kohaku_delta.provenance.dvc_lock import LockedPath
from kohaku_delta.provenance.import_closure import FOLDER


@dataclass(frozen=True)
class StageStatus:
    name: str
    reads: list[str]  # names of the stages whose outs it declares as dependencies; not `code`, which all depend on
    products: list[str]
    outs: dict[str, LockedPath]  # path → what the lock says; empty where the stage has not run
    params: dict  # section or dotted key → value, as the lock has them


def read_stages(folder: Path) -> list[StageStatus]:
    """The stages of the recipe in `folder`, with what its lock says of them. Refuses a lock that names an out
    elsewhere.
    """
    declared, locked = dvc_yaml.stage_declarations(folder), dvc_lock.read_lock(folder / dvc_yaml.LOCK)
    maker = {product: name for name, stage in declared.items() for product in stage.outs}
    stages = []
    for name, stage in declared.items():
        entry = locked.get(name)
        outs = {out.path: out for out in entry.outs} if entry else {}
        for path in map(PurePosixPath, outs):
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{folder / dvc_yaml.LOCK}: {name} has an out {path}; an out lies in its recipe's folder. `dvc repro` writes the lock anew."
                )
        reads = dict.fromkeys(maker[dep] for dep in stage.deps if dep in maker and not dep.startswith(f"{FOLDER}/"))
        stages.append(StageStatus(name, list(reads), list(stage.outs), outs, entry.parameters if entry else {}))
    return stages


def merged_parameters(stages: list[StageStatus]) -> tuple[dict, list[str]]:
    """The sections of the recipe that stages ran with, and the keys on which two stages disagree: one of them ran
    before a change.
    """
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
