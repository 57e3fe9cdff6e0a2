"""Records of runs: what one run of a stage read (before and after it), wrote, was configured with and ran on.

`build/records/<stage>-<key>.json` is written only if the run ended well. It is beside the outputs but is not one of
them, so DVC neither deletes nor restores it. <key> is the digest of what dvc.lock says about the stage's command,
inputs and parameters: a stage that DVC restored from its cache and that never ran here has no record of that key, and
one that ran here finds its own again.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from click.core import ParameterSource
from pydantic import Field

from kohaku_delta import atomic_files, paths, process_facts, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.mappings import differing_keys
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import dvc_yaml, environment, import_closure, loaded_code
from kohaku_delta.provenance.dvc_yaml import StageDeclaration
from kohaku_delta.provenance.import_closure import StageCode
from kohaku_delta.strict_model import StrictModel
from kohaku_delta.yaml_file import read_yaml

FORMATS = ("kohaku-delta record 1", "kohaku-delta record 2")
MAX_BYTES = 4 << 20  # bytes of a record; that of train has 40 kB
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


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
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Loaded(StrictModel):
    """What the stage's process loaded; loaded_code.describe says what each field is."""

    records: dict[str, Sha256]
    changed: list[str]
    others: dict[str, str]
    foreign: list[str]
    startup: list[str]
    variables: list[str]
    files: Count
    bytes: Count


class Record(StrictModel):
    """A record of format 1, which earlier versions wrote, says nothing of what was loaded."""

    format: Literal[FORMATS]  # type: ignore[valid-type]
    stage: str
    command: str
    inputs: dict[str, Input]
    outputs: dict[str, Output]
    parameters: dict[str, Any]  # as used
    parameters_after: dict[str, Any]
    changed_code: list[str]  # files of the stage's code that changed while it ran
    revision: Revision | None
    libraries: dict[str, str]
    loaded: Loaded | None = None
    container: str | None
    numerics: dict[str, str] | None
    confined: str | None  # the layers of the sandbox
    host: dict[str, str]
    times: Times


def record_key(command: str, inputs: dict[str, str], parameters: dict[str, Any]) -> str:
    """The key of a record: digest of the command, the md5 of each input, and the parameters, as dvc.lock has them."""
    return hashlib.sha256(json.dumps([command, inputs, parameters], sort_keys=True).encode()).hexdigest()[:16]


def record_filename(stage: str, key: str) -> str:
    """The name of a record's file in build/records."""
    return f"{stage}-{key}.json"


def read_record(path: Path) -> Record:
    """The record in the file `path`. Raises UserError for one that no stage wrote."""
    return strict_model.read_json(path, Record, MAX_BYTES, "No stage writes such a record.")


@dataclass
class _Run:
    """What is known when a stage begins."""

    stage: StageDeclaration
    script: Path
    code: StageCode | None
    parameters: dict[str, Any]
    sha256s: list[str]  # of the inputs
    revision: Revision | None
    libraries: dict[str, str]
    host: dict[str, str]
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.monotonic)


@contextmanager
def recorded(context: click.Context) -> Iterator[None]:
    """Surrounds the run of a stage and leaves its record. A run with other paths than dvc.yaml declares, and a rank of
    several, leaves none.
    """
    run = _begin(context)
    yield
    if run:
        try:
            _end(run)
        except (OSError, UserError) as error:  # the outputs are whole, and the audit reports that a record is missing
            reason = getattr(error, "strerror", None) or error
            print_line(f"{run.stage.name}: no record was left: {reason}", err=True)


def stage_script(command: click.Command) -> Path | None:
    """The file in which a command's function is defined, if that is a stage: stages/<stage>.py."""
    script = Path(command.callback.__code__.co_filename) if command.callback else None
    return script if script and script.parent.name == "stages" else None


def _begin(context: click.Context) -> _Run | None:
    script = stage_script(context.command)
    if script is None or not Path(dvc_yaml.PIPELINE).is_file() or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    options = [option.name or "" for option in context.command.params if isinstance(option.type, click.Path)]
    if any(context.get_parameter_source(option) is not ParameterSource.DEFAULT for option in options):
        return None
    try:
        stage = dvc_yaml.stage_declarations(Path()).get(script.stem)
    except UserError:  # the stage itself reports it
        return None
    if not stage or not all(Path(path).exists() for path in stage.deps):
        return None
    with suppress(OSError):  # reported at the end
        Path(paths.RECORDS).mkdir(parents=True, exist_ok=True)  # now, because the sandbox is not closed yet
    code = import_closure.verified_code(script)
    root = script.parents[1]
    revision = environment.revision(root, [root / name for name in code.files] if code else [*map(Path, stage.deps)])
    parameters = dvc_yaml.parameters(read_yaml(Path(dvc_yaml.PARAMS)), stage.params)
    sha256s = [digest.sha256 for digest in hashing.digest_paths(map(Path, stage.deps), md5=False)]
    return _Run(
        stage,
        script,
        code,
        parameters,
        sha256s,
        Revision(**revision) if revision else None,
        environment.libraries(code.libraries) if code else {},
        environment.host_facts(),
    )


def _end(run: _Run) -> None:
    """Writes the record. The sandbox is closed: only the stage's inputs, its outputs, its code, params.yaml and
    build/records are open.
    """
    stage, ended, seconds = run.stage, datetime.now(UTC), time.monotonic() - run.clock
    if not all(Path(path).exists() for path in stage.outs):
        return
    digests = hashing.digest_paths(map(Path, stage.deps))
    inputs = {
        path: Input(before=before, after=digest.sha256, md5=digest.md5, bytes=digest.bytes)
        for path, before, digest in zip(stage.deps, run.sha256s, digests, strict=True)
    }
    outputs = {
        path: Output(sha256=digest.sha256, md5=digest.md5, bytes=digest.bytes, files=digest.files)
        for path, digest in zip(stage.outs, hashing.digest_paths(map(Path, stage.outs)), strict=True)
    }
    parameters_after = dvc_yaml.parameters(read_yaml(Path(dvc_yaml.PARAMS)), stage.params)
    code_before = run.code.files if run.code else {}
    code_after = import_closure.file_digests(run.script) if run.code else {}
    device = run.parameters.get("train", {}).get("device", "cpu")  # a stage without it computes on the CPU
    record = Record(
        format=FORMATS[-1],
        stage=stage.name,
        command=stage.command,
        inputs=inputs,
        outputs=outputs,
        parameters=run.parameters,
        parameters_after=parameters_after,
        changed_code=differing_keys(code_before, code_after),
        revision=run.revision,
        libraries=run.libraries,
        loaded=Loaded(**loaded_code.describe(run.libraries, run.script.parents[1])),
        container=environment.container_digest(),
        numerics=process_facts.fact("numerics", device),
        confined=process_facts.fact("confined", device),
        host=run.host,
        times=Times(
            began=run.began.isoformat(timespec="seconds"),
            ended=ended.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
        ),
    )
    key = record_key(stage.command, {path: read.md5 for path, read in inputs.items()}, parameters_after)
    with atomic_files.atomic_write(Path(paths.RECORDS) / record_filename(stage.name, key), "w") as file:
        json.dump(record.model_dump(), file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
