"""Invariant: the provenance is a function of the lock, the recipe and the records, so whoever has those computes it
anew; only then is a signed one believed.

An in-toto Statement v1 with an SLSA provenance v1 predicate: the subjects are all outs, the resolved dependencies all
verified inputs, the code's commit and the libraries; the steps are the stages, each with its materials and products;
the byproducts are the files that a bundle holds as evidence, so the signature covers them too.
"""

import json
import posixpath
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import dvc_yaml, stage_record
from kohaku_delta.provenance.stage_record import Sha256
from kohaku_delta.strict_model import StrictModel
from kohaku_delta.verify.artifact import Artifact, commit, verified_inputs

STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD_TYPE, BUILDER = "urn:kohaku-delta:dvc-recipe:v1", "urn:kohaku-delta:builder:{}"


class Digest(StrictModel):
    sha256: Sha256 | None = None
    commit: Annotated[str | None, Field(alias="gitCommit", pattern=r"^[0-9a-f]{40,64}$")] = None


class Resource(StrictModel):
    name: str
    digest: Digest
    uri: str | None = None


class Step(StrictModel):
    name: str
    command: str
    parameters: dict
    materials: list[Resource]
    products: list[Resource]
    started: Annotated[str, Field(alias="startedOn")]
    finished: Annotated[str, Field(alias="finishedOn")]


class ExternalParameters(StrictModel):
    params: Annotated[dict, Field(alias="params.yaml")]


class InternalParameters(StrictModel):
    steps: list[Step]
    unrecorded: list[str]


class Definition(StrictModel):
    type: Annotated[Literal["urn:kohaku-delta:dvc-recipe:v1"], Field(alias="buildType")]
    external: Annotated[ExternalParameters, Field(alias="externalParameters")]
    internal: Annotated[InternalParameters, Field(alias="internalParameters")]
    dependencies: Annotated[list[Resource], Field(alias="resolvedDependencies")]


class Builder(StrictModel):
    id: str


class Metadata(StrictModel):
    invocation: Annotated[str, Field(alias="invocationId")]
    started: Annotated[str, Field(alias="startedOn")]
    finished: Annotated[str, Field(alias="finishedOn")]


class RunDetails(StrictModel):
    builder: Builder
    metadata: Metadata
    byproducts: list[Resource]


class Predicate(StrictModel):
    definition: Annotated[Definition, Field(alias="buildDefinition")]
    details: Annotated[RunDetails, Field(alias="runDetails")]


class Statement(StrictModel):
    type: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: list[Resource]
    predicate_type: Annotated[Literal["https://slsa.dev/provenance/v1"], Field(alias="predicateType")]
    predicate: Predicate


def read_statement(payload: bytes, told: str) -> dict:
    """A statement whose every field is known. Call it with a payload whose signature was verified."""
    strict_model.parse_json(told, Statement, payload, "Nothing in this provenance is believed.")
    return json.loads(payload)


def build_statement(rebuild: Artifact) -> dict:
    """What is to be signed. Refuses a rebuild that no stage left a record of."""
    if not rebuild.records:
        raise UserError(
            f"{rebuild.told} has no record of any stage ({stage_record.FOLDER}), so nothing can be said of how it came about. Records are left when the stages run."
        )
    recorded = {name: rebuild.records[name] for name in rebuild.stages if name in rebuild.records}
    began, ended = (
        min(each.times.began for each in recorded.values()),
        max(each.times.ended for each in recorded.values()),
    )
    return {
        "_type": STATEMENT,
        "subject": [
            _resource(path, out.sha256) for each in recorded.values() for path, out in sorted(each.outputs.items())
        ],
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
                "metadata": {
                    "invocationId": hashing.digest_path(rebuild.folder / dvc_yaml.LOCK).sha256,
                    "startedOn": began,
                    "finishedOn": ended,
                },
                "byproducts": _byproducts(rebuild),
            },
        },
    }


def _resource(name: str, sha256: str, uri: str | None = None) -> dict:
    return {"name": name, "digest": {"sha256": sha256}} | ({"uri": uri} if uri else {})


def _plain(value):
    """A YAML value as JSON has it: keys are texts."""
    return json.loads(json.dumps(value))


def _step(name: str, each: stage_record.Record) -> dict:
    return {
        "name": name,
        "command": each.command,
        "parameters": _plain(each.parameters),
        "materials": [_resource(path, known.before) for path, known in sorted(each.inputs.items())],
        "products": [_resource(path, out.sha256) for path, out in sorted(each.outputs.items())],
        "startedOn": each.times.began,
        "finishedOn": each.times.ended,
    }


def _dependencies(rebuild: Artifact, recorded: dict[str, stage_record.Record]) -> list[dict]:
    """Verified inputs by their pins, then the files of the repository, then the commit that has them."""
    found = [
        _resource(posixpath.basename(each["path"]), each["sha256"], each["url"]) for each in verified_inputs(rebuild)
    ]
    files = {
        path: known.before
        for each in recorded.values()
        for path, known in each.inputs.items()
        if path not in rebuild.writers
    }
    found += [_resource(path, files[path]) for path in sorted(files)]
    named = commit(rebuild)
    return found + ([{"name": "repository", "digest": {"gitCommit": named}}] if named else [])


def _builder(recorded: dict[str, stage_record.Record]) -> str:
    images = {each.container for each in recorded.values()}
    image = images.pop() if len(images) == 1 else "several"
    return image or "host"


def _byproducts(rebuild: Artifact) -> list[dict]:
    """The lock, the recipe and the records, by name, under the bytes that they have here."""
    places = [dvc_yaml.PIPELINE, dvc_yaml.LOCK, dvc_yaml.PARAMS]
    places += sorted(
        f"{stage_record.FOLDER}/{stage_record.record_filename(name, rebuild.lock[name].key())}"
        for name in rebuild.records
    )
    return [_resource(place, hashing.digest_path(rebuild.folder / Path(place), md5=False).sha256) for place in places]


def first_difference(signed: dict, ours: dict, place: str = "") -> str | None:
    """The first field in which two statements differ, by its path; None where they do not."""
    if isinstance(signed, dict) and isinstance(ours, dict):
        for key in sorted(signed.keys() | ours.keys()):
            if key not in signed or key not in ours:
                return f"{place}{key}"
            if found := first_difference(signed[key], ours[key], f"{place}{key}."):
                return found
        return None
    if isinstance(signed, list) and isinstance(ours, list) and len(signed) == len(ours):
        for number, (a, b) in enumerate(zip(signed, ours)):
            label = a.get("name", str(number)) if isinstance(a, dict) else str(number)
            if found := first_difference(a, b, f"{place}{label}."):
                return found
        return None
    return None if type(signed) is type(ours) and signed == ours else place.rstrip(".")
