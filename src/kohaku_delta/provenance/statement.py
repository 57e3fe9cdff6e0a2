"""The provenance of a rebuild: an in-toto Statement v1 with an SLSA provenance v1 predicate.

The subjects are all outputs; the resolved dependencies are all verified inputs, the files of the repository and its
commit; the steps are the stages, each with its materials and products; the byproducts are dvc.yaml, dvc.lock,
params.yaml, the records and tensors.json (the digests of the weights' tensors). A statement is a function of those
files: a signed one is trusted only if it equals the one that is computed from the files at hand.
"""

import hashlib
import json
import posixpath
from pathlib import Path
from typing import Any

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import bundles, dvc_yaml, signature, stage_record
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.provenance.stage_record import Record


def build_statement(rebuild: Artifact) -> dict[str, Any]:
    """The statement to sign. Raises UserError if no stage left a record."""
    if not rebuild.records:
        raise UserError(
            f"{rebuild.name} has no record of any stage in {paths.RECORDS}, so nothing is known about how it was "
            "made. Stages leave records when they run."
        )
    records = {name: rebuild.records[name] for name in rebuild.stages if name in rebuild.records}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            _resource(path, out.sha256) for record in records.values() for path, out in sorted(record.outputs.items())
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:kohaku-delta:dvc-recipe:v1",
                "externalParameters": {"params.yaml": _as_json(rebuild.values)},
                "internalParameters": {
                    "steps": [_step(name, record) for name, record in records.items()],
                    "unrecorded": [name for name in rebuild.lock if name not in records],
                },
                "resolvedDependencies": _dependencies(rebuild, records),
            },
            "runDetails": {
                "builder": {"id": f"urn:kohaku-delta:builder:{_builder(records)}"},
                "metadata": {
                    "invocationId": hashing.digest_path(rebuild.folder / dvc_yaml.LOCK).sha256,
                    "startedOn": min(record.times.began for record in records.values()),
                    "finishedOn": max(record.times.ended for record in records.values()),
                },
                "byproducts": _byproducts(rebuild),
            },
        },
    }


def _resource(name: str, sha256: str, uri: str | None = None) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}} | ({"uri": uri} if uri else {})


def _as_json(value: Any) -> Any:
    """A YAML value as JSON has it: keys are strings."""
    return json.loads(json.dumps(value))


def _step(name: str, record: Record) -> dict[str, Any]:
    return {
        "name": name,
        "command": record.command,
        "parameters": _as_json(record.parameters),
        "materials": [_resource(path, read.before) for path, read in sorted(record.inputs.items())],
        "products": [_resource(path, out.sha256) for path, out in sorted(record.outputs.items())],
        "startedOn": record.times.began,
        "finishedOn": record.times.ended,
    }


def _dependencies(rebuild: Artifact, records: dict[str, Record]) -> list[dict[str, Any]]:
    """Verified inputs by their pins, then the files of the repository, then its commit."""
    inputs = [_resource(posixpath.basename(entry["path"]), entry["sha256"], entry["url"]) for entry in rebuild.inputs]
    files = {
        path: read.before
        for record in records.values()
        for path, read in record.inputs.items()
        if path not in rebuild.writers
    }
    commit = [{"name": "repository", "digest": {"gitCommit": rebuild.commit}}] if rebuild.commit else []
    return inputs + [_resource(path, files[path]) for path in sorted(files)] + commit


def _builder(records: dict[str, Record]) -> str:
    images = {record.container for record in records.values()}
    return (images.pop() or "host") if len(images) == 1 else "several"


def _byproducts(rebuild: Artifact) -> list[dict[str, Any]]:
    """The pipeline, the lock, the recipe, the records and the digests of the weights' tensors, with the sha256 of their
    bytes: of tensors.json, of those that a bundle has or would have.
    """
    tensors = bundles.json_text(rebuild.tensors).encode()
    records = sorted(
        f"{paths.RECORDS}/{stage_record.record_filename(name, rebuild.lock[name].key())}" for name in rebuild.records
    )
    files = [
        _resource(path, hashing.digest_path(rebuild.folder / path, md5=False).sha256)
        for path in [dvc_yaml.PIPELINE, dvc_yaml.LOCK, dvc_yaml.PARAMS, *records]
    ]
    return [*files, _resource(bundles.TENSORS, hashlib.sha256(tensors).hexdigest())]


def signed_difference(rebuild: Artifact, key: Path) -> str | None:
    """The first field in which the signed provenance.json differs from the statement of the files at hand; None if they
    are equal. Raises UserError if no signature of the public key `key` holds.
    """
    payload = signature.verify_signature(rebuild.folder / bundles.PROVENANCE, key)
    try:
        signed = json.loads(payload)
    except (ValueError, RecursionError):
        raise UserError(f"{bundles.PROVENANCE}: what was signed is not JSON. Nothing in it is trusted.") from None
    return first_difference(signed, build_statement(rebuild))


def first_difference(signed: Any, computed: Any, path: str = "") -> str | None:
    """The dotted path of the first field in which two JSON values differ; None if they are equal."""
    if isinstance(signed, dict) and isinstance(computed, dict):
        pairs = {key: (signed.get(key), computed.get(key)) for key in sorted(signed.keys() | computed.keys())}
        if missing := [key for key in pairs if key not in signed or key not in computed]:
            return f"{path}{missing[0]}"
    elif isinstance(signed, list) and isinstance(computed, list) and len(signed) == len(computed):
        pairs = dict(enumerate(zip(signed, computed, strict=True)))
    else:
        return None if type(signed) is type(computed) and signed == computed else path.rstrip(".") or "the statement"
    for key, (one, other) in pairs.items():
        label = one.get("name", key) if isinstance(signed, list) and isinstance(one, dict) else key
        if difference := first_difference(one, other, f"{path}{label}."):
            return difference
    return None
