"""Where a rebuild differs from one that is known only by its signed statement: what docs/rebuilds.md has of a rebuild.

The outputs of the rebuild at hand are hashed in this run; those of the other are what its signer says.
"""

import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from kohaku_delta.provenance import dvc_yaml, signature
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.strict_model import PartialModel, parse_json
from kohaku_delta.verify.compare_rebuilds import Line, differing_keys, parameter_differences
from kohaku_delta.verify.findings import format_some


class _Sha256(PartialModel):
    sha256: str


class _Resource(PartialModel):
    name: str
    digest: _Sha256
    uri: str | None = None


class _Dependency(PartialModel):
    name: str
    digest: dict[str, str]
    uri: str | None = None


class _Step(PartialModel):
    name: str
    products: list[_Resource]


class _Parameters(PartialModel):
    steps: list[_Step]


class _BuildDefinition(PartialModel):
    buildType: Literal["urn:kohaku-delta:dvc-recipe:v1"]
    externalParameters: dict[str, dict[str, Any]]
    internalParameters: _Parameters
    resolvedDependencies: list[_Dependency]


class _Predicate(PartialModel):
    buildDefinition: _BuildDefinition


class SignedBuild(PartialModel):
    """What `kohaku-delta provenance --key` signed."""

    predicateType: Literal["https://slsa.dev/provenance/v1"]
    predicate: _Predicate

    @property
    def definition(self) -> _BuildDefinition:
        return self.predicate.buildDefinition

    def outputs(self) -> dict[str, dict[str, str]]:
        """Stage → output path → sha256."""
        steps = self.definition.internalParameters.steps
        return {step.name: {out.name: out.digest.sha256 for out in step.products} for step in steps}

    def inputs(self) -> dict[str, str]:
        """Url → sha256."""
        return {one.uri: one.digest.get("sha256", "") for one in self.definition.resolvedDependencies if one.uri}

    def commit(self) -> str | None:
        commits = [one.digest.get("gitCommit") for one in self.definition.resolvedDependencies]
        return next((commit for commit in commits if commit), None)


def read_signed_build(path: Path, key: Path) -> SignedBuild:
    """A signed statement. Raises UserError if the owner of the public key `key` did not sign it."""
    return parse_json(path, SignedBuild, signature.verify_signature(path, key), "Nothing in it is believed.")


def differing_outputs(rebuild: Artifact, signed: SignedBuild) -> dict[str, list[str]]:
    """Stage → its outputs whose bytes here are not those that were signed; in the order of the signed steps."""
    return {
        stage: [out for out, sha256 in outs.items() if out in rebuild.digests and rebuild.digests[out].sha256 != sha256]
        for stage, outs in signed.outputs().items()
    }


def unmatched_outputs(rebuild: Artifact, signed: SignedBuild) -> list[str]:
    """Sentences about outputs that only one of the two has."""
    theirs = {out for outs in signed.outputs().values() for out in outs}
    lines = []
    if absent := sorted(theirs - rebuild.digests.keys()):
        lines.append(f"not here, so not compared: {format_some(absent)}")
    if unsigned := sorted(rebuild.writers.keys() - theirs):
        lines.append(f"not signed, so not compared: {format_some(unsigned)}")
    return lines


def causes(rebuild: Artifact, signed: SignedBuild) -> Iterator[Line]:
    """Inputs, parameters and commit that differ: the rebuild's before “|”."""
    ours = {entry["url"]: entry["sha256"] for entry in rebuild.inputs}
    theirs = signed.inputs()
    for url in differing_keys(ours, theirs):
        here, there = (f"{inputs[url][:16]}…" if url in inputs else "missing" for inputs in (ours, theirs))
        yield "input", f"{posixpath.basename(url)}: {here} | {there}"
    parameters = rebuild.values, signed.definition.externalParameters.get(dvc_yaml.PARAMS, {})
    yield from parameter_differences(*(json.loads(json.dumps(each, sort_keys=True)) for each in parameters))
    if rebuild.commit != signed.commit():
        yield "commit", f"{rebuild.commit or 'unknown'} | {signed.commit() or 'unknown'}"
