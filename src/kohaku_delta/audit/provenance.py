"""Invariant: the provenance is a function of the lock, the recipe and the records, so whoever has those computes it anew; only then is a signed one believed.

An in-toto Statement v1 with an SLSA provenance v1 predicate: the subjects are all outs, the resolved dependencies all verified inputs, the code's commit
and the libraries; the steps are the stages, each with its materials and products; the byproducts are the files that a bundle holds as evidence, so the
signature covers them too.
"""

import json
import posixpath
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kohaku_delta.audit.rebuild import Rebuild, commit, outside
from kohaku_delta.evidence import digests, pipeline, record
from kohaku_delta.evidence.record import Sha256
from kohaku_delta.refusal import Refusal

STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD_TYPE, BUILDER = "urn:kohaku-delta:dvc-recipe:v1", "urn:kohaku-delta:builder:{}"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Digest(Section):
    sha256: Sha256 | None = None
    commit: Annotated[str | None, Field(alias="gitCommit", pattern=r"^[0-9a-f]{40,64}$")] = None


class Resource(Section):
    name: str
    digest: Digest
    uri: str | None = None


class Step(Section):
    name: str
    command: str
    parameters: dict
    materials: list[Resource]
    products: list[Resource]
    started: Annotated[str, Field(alias="startedOn")]
    finished: Annotated[str, Field(alias="finishedOn")]


class External(Section):
    params: Annotated[dict, Field(alias="params.yaml")]


class Internal(Section):
    steps: list[Step]
    unrecorded: list[str]


class Definition(Section):
    type: Annotated[Literal["urn:kohaku-delta:dvc-recipe:v1"], Field(alias="buildType")]
    external: Annotated[External, Field(alias="externalParameters")]
    internal: Annotated[Internal, Field(alias="internalParameters")]
    dependencies: Annotated[list[Resource], Field(alias="resolvedDependencies")]


class Builder(Section):
    id: str


class Metadata(Section):
    invocation: Annotated[str, Field(alias="invocationId")]
    started: Annotated[str, Field(alias="startedOn")]
    finished: Annotated[str, Field(alias="finishedOn")]


class Details(Section):
    builder: Builder
    metadata: Metadata
    byproducts: list[Resource]


class Predicate(Section):
    definition: Annotated[Definition, Field(alias="buildDefinition")]
    details: Annotated[Details, Field(alias="runDetails")]


class Statement(Section):
    type: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: list[Resource]
    predicate_type: Annotated[Literal["https://slsa.dev/provenance/v1"], Field(alias="predicateType")]
    predicate: Predicate


def read(payload: bytes, told: str) -> dict:
    """A statement whose every field is known. Call it with a payload whose signature was verified."""
    try:
        Statement.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        reason = "is not known" if first["type"] == "extra_forbidden" else f"is wrong: {first['msg']}"
        raise Refusal(f"{told}: the provenance's field {place} {reason}. Nothing in it is believed.") from None
    return json.loads(payload)


def statement(rebuild: Rebuild) -> dict:
    """What is to be signed. Refuses a rebuild that no stage left a record of."""
    if not rebuild.records:
        raise Refusal(
            f"{rebuild.told} has no record of any stage ({record.FOLDER}), so nothing can be said of how it came about. Records are left when the stages run."
        )
    recorded = {name: rebuild.records[name] for name in rebuild.stages if name in rebuild.records}
    began, ended = min(each.times.began for each in recorded.values()), max(each.times.ended for each in recorded.values())
    return {
        "_type": STATEMENT,
        "subject": [_resource(path, out.sha256) for each in recorded.values() for path, out in sorted(each.outputs.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"params.yaml": _plain(rebuild.values)},
                "internalParameters": {
                    "steps": [_step(name, each) for name, each in recorded.items()],
                    "unrecorded": [name for name in rebuild.lock if name not in recorded],
                },
                "resolvedDependencies": _dependencies(rebuild, recorded),
            },
            "runDetails": {
                "builder": {"id": BUILDER.format(_builder(recorded))},
                "metadata": {"invocationId": digests.of(rebuild.folder / pipeline.LOCK).sha256, "startedOn": began, "finishedOn": ended},
                "byproducts": _evidence(rebuild),
            },
        },
    }


def _resource(name: str, sha256: str, uri: str | None = None) -> dict:
    return {"name": name, "digest": {"sha256": sha256}} | ({"uri": uri} if uri else {})


def _plain(value):
    """A YAML value as JSON has it: keys are texts."""
    return json.loads(json.dumps(value))


def _step(name: str, each: record.Record) -> dict:
    return {
        "name": name,
        "command": each.command,
        "parameters": _plain(each.parameters),
        "materials": [_resource(path, known.before) for path, known in sorted(each.inputs.items())],
        "products": [_resource(path, out.sha256) for path, out in sorted(each.outputs.items())],
        "startedOn": each.times.began,
        "finishedOn": each.times.ended,
    }


def _dependencies(rebuild: Rebuild, recorded: dict[str, record.Record]) -> list[dict]:
    """Verified inputs by their pins, then the files of the repository, then the commit that has them."""
    found = [_resource(posixpath.basename(each["path"]), each["sha256"], each["url"]) for each in outside(rebuild)]
    files = {path: known.before for each in recorded.values() for path, known in each.inputs.items() if path not in rebuild.writers}
    found += [_resource(path, files[path]) for path in sorted(files)]
    named = commit(rebuild)
    return found + ([{"name": "repository", "digest": {"gitCommit": named}}] if named else [])


def _builder(recorded: dict[str, record.Record]) -> str:
    images = {each.container for each in recorded.values()}
    image = images.pop() if len(images) == 1 else "several"
    return image or "host"


def _evidence(rebuild: Rebuild) -> list[dict]:
    """The lock, the recipe and the records, by name, under the bytes that they have here."""
    places = [pipeline.PIPELINE, pipeline.LOCK, pipeline.PARAMS]
    places += sorted(f"{record.FOLDER}/{record.name(name, rebuild.lock[name].key())}" for name in rebuild.records)
    return [_resource(place, digests.of(rebuild.folder / Path(place), md5=False).sha256) for place in places]


def parted(signed: dict, ours: dict, place: str = "") -> str | None:
    """The first field in which two statements differ, by its path; None where they do not."""
    if isinstance(signed, dict) and isinstance(ours, dict):
        for key in sorted(signed.keys() | ours.keys()):
            if key not in signed or key not in ours:
                return f"{place}{key}"
            if found := parted(signed[key], ours[key], f"{place}{key}."):
                return found
        return None
    if isinstance(signed, list) and isinstance(ours, list) and len(signed) == len(ours):
        for number, (a, b) in enumerate(zip(signed, ours)):
            label = a.get("name", str(number)) if isinstance(a, dict) else str(number)
            if found := parted(a, b, f"{place}{label}."):
                return found
        return None
    return None if type(signed) is type(ours) and signed == ours else place.rstrip(".")
