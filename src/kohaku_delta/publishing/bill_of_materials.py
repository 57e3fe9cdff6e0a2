"""bom.json of a release: model, data and software as a CycloneDX 1.6 ML-BOM.

A function of the build: no time, no host, no random number; its serial number is the UUID of its content. The
library cyclonedx-python-lib has no model cards, so the content is made here and validated by its strict JSON schema
(`make proofs`, tests).
"""

import json
import posixpath
import uuid
from typing import Any
from urllib.parse import quote

from kohaku_delta import paths
from kohaku_delta.formats import hashing
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.report import model_card
from kohaku_delta.report.build_files import HeldOut
from kohaku_delta.report.build_summary import Build

FILE_REF, INPUT_REF, TABLE_REF = "file:", "input:", "table:"  # how the bom-ref of such a component begins
TABLES = (paths.SELECTION, paths.DROPPED, paths.POSTS, paths.CAPTIONS, paths.SCHEDULE)
URL_SAFE = ":/?#[]@!$&'()*+,;=%~"


def bom(rebuild: Artifact, build: Build, files: dict[str, str]) -> str:
    """The text of bom.json. files: name → sha256 of every other file of the release, without signatures."""
    listed = [_file(name, files[name]) for name in sorted(files)]
    inputs = [_input(number, entry) for number, entry in enumerate(rebuild.inputs)]
    tables = [_component(TABLE_REF + path, "data", path, rebuild.digests[path].sha256) for path in TABLES]
    libraries = _libraries(rebuild)
    refs = [each["bom-ref"] for each in (*listed, *inputs)]
    content = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _model(build)},
        "components": [*listed, *inputs, _dataset(build, tables), _code(rebuild), *libraries],
        "dependencies": [
            {"ref": "model", "dependsOn": [*refs, "dataset", "kohaku-delta"]},
            {"ref": "kohaku-delta", "dependsOn": [each["bom-ref"] for each in libraries]},
        ],
    }
    return json.dumps(content | {"serialNumber": serial_number(content)}, indent=1) + "\n"


def serial_number(content: dict[str, Any]) -> str:
    """The serial number that belongs to a content, which may have one already."""
    text = json.dumps({key: value for key, value in content.items() if key != "serialNumber"}, sort_keys=True)
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text)}"


def input_url(url: str) -> str:
    """The url of an input as CycloneDX has it: without characters that no URL may have."""
    return quote(url, safe=URL_SAFE)


def _component(ref: str, kind: str, name: str, sha256: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": ref, "name": name, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def _file(name: str, sha256: str) -> dict[str, Any]:
    kind = "machine-learning-model" if name.endswith(".safetensors") else "file"
    return _component(FILE_REF + name, kind, name, sha256)


def _input(number: int, entry: dict[str, Any]) -> dict[str, Any]:
    name = posixpath.basename(entry["path"])
    kind = "machine-learning-model" if name.endswith(".safetensors") else "data"
    component = _component(f"{INPUT_REF}{number}", kind, name, entry["sha256"])
    return component | {"externalReferences": [{"type": "distribution", "url": input_url(entry["url"])}]}


def _model(build: Build) -> dict[str, Any]:
    bake, link = build.recipe.bake, model_card.license_link(build)
    described: dict[str, Any] = {"authors": [{"name": bake.author}]} if bake.author else {}
    described |= {"description": bake.description} if bake.description else {}
    if bake.license:
        described["licenses"] = [{"license": {"name": bake.license} | ({"url": link} if link else {})}]
    card: dict[str, Any] = {
        "modelParameters": {
            "task": "text-to-image",
            "architectureFamily": "latent diffusion",
            "modelArchitecture": "Stable Diffusion XL",
            "datasets": [{"ref": "dataset"}],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "image"}],
        }
    }
    if isinstance(build.held_out, HeldOut):
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": "held-out loss", "value": repr(measured.loss.sdxl), "slice": name}
                for name, measured in (("base", build.held_out.base), ("final", build.held_out.final))
            ]
        }
    named = {"type": "machine-learning-model", "bom-ref": "model", "name": bake.title or "untitled"}
    return named | described | {"modelCard": card}


def _dataset(build: Build, tables: list[dict[str, Any]]) -> dict[str, Any]:
    dataset = build.dataset
    counts = {"selected": dataset.selected, "trained": dataset.trained, "steps": dataset.steps} if dataset else {}
    return {
        "type": "data",
        "bom-ref": "dataset",
        "name": "training dataset",
        "description": "The tables of which croissant.json describes each column. They are not published.",
        "data": [{"type": "dataset", "contents": {"url": "croissant.json"}}],
        "properties": [{"name": f"kohaku-delta:{name}", "value": str(count)} for name, count in counts.items()],
        "components": tables,
    }


def _code(rebuild: Artifact) -> dict[str, Any]:
    """This project: one digest over the syntax trees of all files that a stage runs."""
    files = {name: digest for code in rebuild.code.values() for name, digest in code.files.items()}
    return {
        "type": "application",
        "bom-ref": "kohaku-delta",
        "name": "kohaku-delta",
        "properties": [{"name": "kohaku-delta:code", "value": hashing.folder_digest(files)}],
    }


def _libraries(rebuild: Artifact) -> list[dict[str, Any]]:
    """Every library that the code of a stage imports, itself or through others."""
    versions = {name: library.version for code in rebuild.code.values() for name, library in code.libraries.items()}
    purls = {name: f"pkg:pypi/{name}@{quote(version, safe='')}" for name, version in versions.items()}
    return [
        {"type": "library", "bom-ref": purls[name], "name": name, "version": versions[name], "purl": purls[name]}
        for name in sorted(versions)
    ]
