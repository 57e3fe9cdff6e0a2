"""Invariant: a record says what one run of a stage read (before and after it), wrote, was told and ran on; it is
written only when the run ended well.

`build/records/<stage>-<key>.json` lies beside the outs and is none of them, so DVC neither deletes nor restores it.
<key> is the digest of what dvc.lock says of the stage's command, inputs and parameters: a stage restored from DVC's
cache to a state that was never run here has no record of that key, and one that was run here finds its own again.
"""

import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import click
from pydantic import BaseModel, Field

from kohaku_delta import atomic_files, process_facts, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import dvc_yaml, environment, import_closure
from kohaku_delta.provenance.import_closure import StageCode
from kohaku_delta.strict_model import StrictModel
from kohaku_delta.yaml_file import read_yaml

FOLDER = "build/records"
MOST = 4 << 20  # bytes of a record; that of train has 40 kB
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")]
Count = Annotated[int, Field(ge=0)]


class Input(StrictModel):
    """sha256 before and after the run; md5 and size after it, as DVC takes them."""

    before: Sha256
    after: Sha256
    md5: Md5
    bytes: Count


class Output(StrictModel):
    """files: sha256 of each file of a folder; null for a file."""

    sha256: Sha256
    md5: Md5
    bytes: Count
    files: dict[str, Sha256] | None


class Revision(StrictModel):
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]
    dirty: bool  # an input differed from it


class Times(StrictModel):
    began: str
    ended: str
    seconds: float


class Record(StrictModel):
    format: Literal["kohaku-delta record 1"]
    stage: str
    command: str
    inputs: dict[str, Input]
    outputs: dict[str, Output]
    parameters: dict  # as used
    parameters_after: dict
    changed_code: list[str]  # files of the stage's code that changed while it ran
    revision: Revision | None
    libraries: dict[str, str]
    container: str | None
    numerics: dict[str, str] | None
    confined: str | None  # what held the stage to what it declares
    host: dict[str, str]
    times: Times


def record_key(command: str, inputs: dict[str, str], parameters: dict) -> str:
    """What names a record: digest of a command, the md5 of each input, and the parameters, as dvc.lock has them."""
    return hashlib.sha256(json.dumps([command, inputs, parameters], sort_keys=True).encode()).hexdigest()[:16]


def record_filename(stage: str, of: str) -> str:
    """The file's name in FOLDER."""
    return f"{stage}-{of}.json"


def read_record(path: Path) -> Record:
    """The record in the file `path`. Raises UserError for one that no stage wrote."""
    return strict_model.read_json(path, Record, MOST, "No stage writes such a record.")


@contextmanager
def recorded(context: click.Context):
    """Around a stage's run. Leaves a record where it ran as the dvc.yaml of this folder declares it; with other paths,
    or as one of several ranks, none.
    """
    run = _begin(context)
    yield
    if run:
        try:
            _end(*run)
        except (
            OSError,
            UserError,
        ) as error:  # the outs are whole: a record that cannot be written is missing, and the audit will say so
            click.echo(f"{run[0].name}: no record was left: {getattr(error, 'strerror', None) or error}", err=True)


def _begin(context: click.Context):
    script = Path(context.command.callback.__code__.co_filename)
    if script.parent.name != "stages" or not Path(dvc_yaml.PIPELINE).is_file() or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    paths = [option.name for option in context.command.params if isinstance(option.type, click.Path)]
    if any(context.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT for option in paths):
        return None
    try:
        stage, values = (dvc_yaml.stage_declarations(Path()).get(script.stem), read_yaml(Path(dvc_yaml.PARAMS)))
    except UserError:  # the stage says itself what is wrong
        return None
    if not stage or not all(Path(path).exists() for path in stage.deps):
        return None
    with suppress(OSError):  # said at the end
        Path(FOLDER).mkdir(parents=True, exist_ok=True)  # while the stage is not held yet
    code = import_closure.verified_code(script)
    facts = {
        "parameters": dvc_yaml.parameters(values, stage.params),
        "revision": environment.revision(
            script.parents[1],
            [script.parents[1] / name for name in code.files] if code else [Path(path) for path in stage.deps],
        ),
        "libraries": environment.libraries(code.libraries) if code else {},
        "container": environment.container_facts(),
        "host": environment.host_facts(),
    }
    before = [digest.sha256 for digest in hashing.digest_paths(map(Path, stage.deps), md5=False)]
    device = (
        facts["parameters"].get("train", {}).get("device", "cpu")
    )  # a stage that is not told it computes on the processor
    return stage, script, code, device, facts, before, datetime.now(UTC), time.monotonic()


def _end(
    stage: dvc_yaml.StageDeclaration,
    script: Path,
    code: StageCode | None,
    device: str,
    facts: dict,
    before: list[str],
    began: datetime,
    started: float,
) -> None:
    """Opens the stage's inputs (the lock of the libraries among them), its outs and params.yaml, and writes in FOLDER:
    nothing else, once the stage began.
    """
    ended, seconds = datetime.now(UTC), time.monotonic() - started
    if not all(Path(path).exists() for path in stage.outs):
        return
    inputs = {
        path: Input(before=was, after=now.sha256, md5=now.md5, bytes=now.bytes)
        for path, was, now in zip(stage.deps, before, hashing.digest_paths(map(Path, stage.deps)))
    }
    outputs = {
        path: Output(sha256=each.sha256, md5=each.md5, bytes=each.bytes, files=each.files)
        for path, each in zip(stage.outs, hashing.digest_paths(map(Path, stage.outs)))
    }
    after = dvc_yaml.parameters(read_yaml(Path(dvc_yaml.PARAMS)), stage.params)
    times = Times(
        began=began.isoformat(timespec="seconds"), ended=ended.isoformat(timespec="seconds"), seconds=round(seconds, 3)
    )
    numerics = process_facts.fact("numerics", device)
    ran = code.files if code else {}
    now = import_closure.file_digests(script) if code else {}
    record = {
        "format": "kohaku-delta record 1",
        "stage": stage.name,
        "command": stage.command,
        "inputs": inputs,
        "outputs": outputs,
        **facts,
        "numerics": numerics,
        "changed_code": sorted(name for name in ran.keys() | now.keys() if ran.get(name) != now.get(name)),
        "confined": process_facts.fact("confined", device),
    }
    of = record_key(stage.command, {path: each.md5 for path, each in inputs.items()}, after)
    write_record(Path(FOLDER) / record_filename(stage.name, of), record | {"parameters_after": after, "times": times})


def write_record(path: Path, record: dict) -> None:
    with atomic_files.atomic_write(path, "w") as file:
        json.dump(record, file, indent=1, sort_keys=True, ensure_ascii=False, default=BaseModel.model_dump)
        file.write("\n")
