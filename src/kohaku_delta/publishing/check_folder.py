"""The checks folder/*: a published folder (`release/`, or a stranger's download of one) against its own proofs.

folder/files compares every file with bom.json; signature, with model.sig; provenance, with the outputs that
provenance.json names; bom and dataset, what bom.json and croissant.json say with each other and with provenance.json;
build, with the build beside the folder, if there is one.

Without a public key nothing signed is trusted: what contradicts it fails, what agrees with it is no PASS.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from kohaku_delta import paths, strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.params import Recipe, Release
from kohaku_delta.printing import format_some
from kohaku_delta.provenance import bundles, dvc_yaml, folder_signature
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.publishing import bill_of_materials, release_folder
from kohaku_delta.publishing.published_folder import REMEDY, PublishedFolder
from kohaku_delta.verify.findings import FAIL, Check, Finding, Skip, check

MARKS = (release_folder.BOM, release_folder.DATASET, folder_signature.FILE)  # a folder with one of them is published


def is_published_folder(path: Path) -> bool:
    """Whether an audit of this path is one of a published folder, not of a recipe's folder or bundle."""
    others = (dvc_yaml.PIPELINE, dvc_yaml.LOCK, bundles.MANIFEST)
    return any(os.path.lexists(path / name) for name in MARKS) and not any((path / name).exists() for name in others)


def audit_folder(path: Path, key: Path | None) -> Iterator[Finding]:
    """One finding per check."""
    published = PublishedFolder(path, key)
    try:
        _ = published.files
    except UserError as error:  # there is something that cannot be looked at
        yield Finding("folder", "files", FAIL, error.message)
        return
    yield check_files(published)
    yield check_signature(published)
    yield check_provenance(published)
    yield check_bom(published)
    yield check_dataset(published)
    yield check_build(published)


@check("folder/files")
def check_files(published: PublishedFolder) -> Check:
    """The folder's files are those of bom.json, with the same sha256."""
    listed = published.listed(bill_of_materials.FILE_REF)
    found = {name: sha256 for name, sha256 in published.unsigned.items() if name != release_folder.BOM}
    yield from _differences(found, listed, release_folder.BOM)
    return f"{len(listed)} files have the sha256 that {release_folder.BOM} says, and no other is here"


def _differences(found: dict[str, str], listed: dict[str, Any], source: str) -> Iterator[str]:
    for name in sorted(found.keys() | listed.keys()):
        if name not in listed:
            yield f"{name} is not in {source}"
        elif name not in found:
            yield f"{name} is missing, {source} lists it"
        elif found[name] != listed[name]:
            yield f"{name} has the sha256 {found[name][:16]}…, {source} says {str(listed[name])[:16]}…"


@check("folder/signature")
def check_signature(published: PublishedFolder) -> Check:
    """model.sig is signed by the public key, and signs these files and no others."""
    name = folder_signature.FILE
    if name not in published.files:
        if published.key:
            yield f"{name} is missing: the folder is not signed"
        raise Skip("the folder is not signed")
    if not published.key:
        raise Skip("signed, but without --key nothing in it is trusted")
    signed = folder_signature.signed_files(published.folder / name, published.key)
    left_out = (name, *folder_signature.GIT_FILES)
    found = {file: sha256 for file, sha256 in published.files.items() if file.split("/")[0] not in left_out}
    yield from _differences(found, signed, name)
    return f"signed by the key of {published.key}: {len(signed)} files, and no other is here"


@check("folder/provenance")
def check_provenance(published: PublishedFolder) -> Check:
    """The files are the outputs that the provenance names."""
    if published.statement is None:
        if published.key:
            yield f"{bundles.PROVENANCE} is missing: nothing says how the files were made"
        raise Skip(f"there is no {bundles.PROVENANCE}")
    values = published.statement.parameters
    recipe = strict_model.validate(f"{bundles.PROVENANCE}, params.yaml", Recipe, values, REMEDY)
    compared, agrees = 0, True
    for fault, count in _output_faults(published, recipe):
        compared += count
        if fault:
            agrees = False
            yield fault
    if agrees and not published.key:
        raise Skip(f"{compared} files agree with it, but without --key nothing in it is trusted")
    unknown = sorted({*_published_outputs(recipe.release)} - published.outputs.keys())
    not_named = f"; it does not name {', '.join(unknown)}" if unknown else ""
    return f"signed by the key of {published.key}; {compared} files are the outputs that it names{not_named}"


def _published_outputs(names: Release) -> tuple[str, ...]:
    return (*release_folder.single_files(names), paths.MILESTONES, paths.SAMPLES, paths.DIFFUSERS)


def _output_faults(published: PublishedFolder, recipe: Recipe) -> Iterator[tuple[str, int]]:
    """For each published output that the provenance names: ("" or what is wrong, how many files it has)."""
    names = release_folder.single_files(recipe.release)
    files: dict[str, dict[str, str]] = {out: {} for out in (paths.MILESTONES, paths.SAMPLES, paths.DIFFUSERS)}
    for name, sha256 in published.unsigned.items():
        if place := _place_in_folder(name, recipe.release):
            files[place[0]][place[1]] = sha256
    for out, signed in published.outputs.items():
        source = f"as {bundles.PROVENANCE} names it ({signed[:16]}…)"
        if out in names:
            found = published.files.get(names[out])
            yield ("" if found == signed else f"{names[out]} is not {out} {source}"), 1
        elif out in files:
            found = hashing.folder_digest(files[out])
            some = format_some(sorted(files[out]))
            yield ("" if found == signed else f"the files of {out} ({some}) are not {source}"), len(files[out])


def _place_in_folder(name: str, names: Release) -> tuple[str, str] | None:
    """The output that is a folder, and the path in it, of a published file; None for all other files."""
    others = {release_folder.CARD, release_folder.BOM, release_folder.DATASET}
    if name in {*others, *release_folder.single_files(names).values(), names.training, names.preset}:
        return None
    if name.startswith(release_folder.SAMPLES):
        return paths.SAMPLES, name.removeprefix(release_folder.SAMPLES)
    digits = PurePosixPath(name).stem.rpartition("-step")[2]
    if digits.isascii() and digits.isdecimal() and release_folder.milestone_file(names, int(digits)) == name:
        return paths.MILESTONES, paths.milestone_name(int(digits))
    return paths.DIFFUSERS, name


@check("folder/bom")
def check_bom(published: PublishedFolder) -> Check:
    """bom.json was not edited since its serial number was made; its inputs and tables are those of the provenance."""
    name, serial = release_folder.BOM, published.bom.serialNumber
    if bill_of_materials.serial_number(published.read_json(name)) != serial:
        yield f"{name} was edited: its serial number is not that of its content"
    refs = Counter(each.bom_ref for each in published.components)
    yield from (f"{name}: {ref:.80} is there {count} times" for ref, count in refs.items() if count > 1)
    for each in published.components:
        for kind in (bill_of_materials.FILE_REF, bill_of_materials.TABLE_REF):
            if each.bom_ref.startswith(kind) and each.bom_ref != kind + each.name:
                yield f"{name}: {each.bom_ref} is named {each.name}"
    inputs = [each for each in published.components if each.bom_ref.startswith(bill_of_materials.INPUT_REF)]
    tables = published.listed(bill_of_materials.TABLE_REF)
    counts = f"{len(inputs)} inputs, {len(tables)} tables"
    unedited = f"{counts}; its serial number is that of its content"
    if published.statement is None:
        return unedited
    signed = sorted(
        (each.name, each.digest.get("sha256"), bill_of_materials.input_url(each.uri))
        for each in published.statement.dependencies
        if each.uri
    )
    listed = sorted(
        (each.name, each.sha256 or "", each.references[0].url if each.references else "") for each in inputs
    )
    for entry in sorted({*signed} ^ {*listed}, key=str):
        where = name if entry in listed else bundles.PROVENANCE
        yield f"the input {entry[0]} ({str(entry[1])[:16]}…) is only in {where}"
    named = {out: published.outputs[out] for out in bill_of_materials.TABLES if out in published.outputs}
    others = {out: sha256 for out, sha256 in tables.items() if out in named or out not in bill_of_materials.TABLES}
    yield from _differences(named, others, name)
    return f"{counts}, as {bundles.PROVENANCE} names them" if published.key else unedited


@check("folder/dataset")
def check_dataset(published: PublishedFolder) -> Check:
    """croissant.json describes the tables of bom.json, which are those of the provenance."""
    tables = {each.contentUrl: each.sha256 for each in published.dataset.distribution}
    yield from _differences(tables, published.listed(bill_of_materials.TABLE_REF), release_folder.BOM)
    return f"{len(tables)} tables have the hashes of {release_folder.BOM}"


@check("folder/build")
def check_build(published: PublishedFolder) -> Check:
    """If the folder is beside its build, every file is, byte for byte, the one that the build gives."""
    folder = published.folder.resolve()
    if folder.name != release_folder.FOLDER or not (folder.parent / dvc_yaml.LOCK).exists():
        raise Skip("there is no build beside the folder")
    try:
        with open_artifact(folder.parent) as rebuild:
            release_folder.require_locked(rebuild, release_folder.CHECKS)
            expected = release_folder.expected_files(rebuild)
    except UserError as error:
        raise Skip(f"the build beside the folder cannot be compared: {error.lines[0]}") from None
    yield from _differences(published.unsigned, expected, "the build beside the folder")
    return f"{len(expected)} files are, byte for byte, those that the build beside the folder gives"
