"""Where a rebuild differs from one that is known only by its signed statement: what docs/rebuilds.md has of a rebuild.

The outputs of the rebuild at hand are hashed in this run; those of the other are what its signer says.
"""

import json
import posixpath
from collections.abc import Iterator
from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.mappings import differing_keys
from kohaku_delta.printing import format_some
from kohaku_delta.provenance import signature
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.provenance.signed_statement import SignedStatement, parse_statement
from kohaku_delta.verify.compare_rebuilds import Line, parameter_differences


def read_signed(path: Path, key: Path) -> SignedStatement:
    """The signed statement in a file. Raises UserError if the owner of the public key `key` did not sign it."""
    return parse_statement(str(path), signature.verify_signature(path, key), "Nothing in it is trusted.")


def differing_outputs(rebuild: Artifact, signed: SignedStatement) -> dict[str, list[str]]:
    """Stage → its outputs whose bytes here are not those that were signed; in the order of the signed steps."""
    digests, signed_digests = rebuild.digests, signed.outputs
    return {
        stage: [out for out in outs if out in digests and digests[out].sha256 != signed_digests.get(out)]
        for stage, outs in signed.stages.items()
    }


def describes_code(out: str) -> bool:
    """Whether an output says which code a stage runs, and nothing of what it computed."""
    return posixpath.dirname(out) == paths.CODE


def unmatched_outputs(rebuild: Artifact, signed: SignedStatement) -> list[str]:
    """Sentences about outputs that only one of the two has."""
    theirs = {out for outs in signed.stages.values() for out in outs}
    lines = []
    if absent := sorted(theirs - rebuild.digests.keys()):
        lines.append(f"not here, so not compared: {format_some(absent)}")
    if unsigned := sorted(rebuild.writers.keys() - theirs):
        lines.append(f"not signed, so not compared: {format_some(unsigned)}")
    return lines


def causes(rebuild: Artifact, signed: SignedStatement) -> Iterator[Line]:
    """Inputs, parameters and commit that differ: the rebuild's before “|”."""
    ours = {entry["url"]: entry["sha256"] for entry in rebuild.inputs}
    theirs = {each.uri: each.digest.get("sha256", "") for each in signed.dependencies if each.uri}
    for url in differing_keys(ours, theirs):
        here, there = (f"{inputs[url][:16]}…" if url in inputs else "missing" for inputs in (ours, theirs))
        yield "input", f"{posixpath.basename(url)}: {here} | {there}"
    parameters = rebuild.values, signed.parameters
    yield from parameter_differences(*(json.loads(json.dumps(each, sort_keys=True)) for each in parameters))
    if rebuild.commit != signed.commit:
        yield "commit", f"{rebuild.commit or 'unknown'} | {signed.commit or 'unknown'}"
