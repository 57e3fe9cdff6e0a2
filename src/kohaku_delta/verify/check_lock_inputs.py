"""The checks lock/code, libraries, loaded, pins and data: what the stages ran and read from outside the pipeline."""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_delta import paths
from kohaku_delta.danbooru import posts_json
from kohaku_delta.formats import hashing
from kohaku_delta.hub import inputs_manifest, pins
from kohaku_delta.mappings import differing_keys
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.printing import format_some
from kohaku_delta.provenance import bundles, import_closure, stage_record
from kohaku_delta.provenance.artifact import MAX_INPUTS, Artifact, is_library_locks
from kohaku_delta.regular_files import read_regular
from kohaku_delta.verify import known_code
from kohaku_delta.verify.findings import Check, Skip, check
from kohaku_delta.verify.known_code import KnownCode

SHA256 = re.compile(r"[0-9a-f]{64}")
# what an installer of Python or a distribution of Linux puts there; the record names it, and the line repeats it
HARMLESS_STARTUP = {"_virtualenv.pth", "sitecustomize"}  # a sitecustomize outside of Python's own folder is foreign
FORCING_VARIABLES = {"LD_AUDIT", "LD_PRELOAD"}


@check("lock/code", paths.CODE)
def check_code(rebuild: Artifact) -> Check:
    """build/code names every file of every stage, with its digest, as the code at hand has them, or that of the commit
    that the records name.
    """
    if not rebuild.code:
        raise Skip(f"{paths.CODE} does not exist: the stage `code` has not run here")
    digests: dict[str, str] = {}
    for name, code in rebuild.code.items():
        if conflicting := [file for file, digest in code.files.items() if digests.setdefault(file, digest) != digest]:
            files = format_some(conflicting)
            yield f"{files} differed between {code.stage} and another stage: run `dvc repro` to its end"
        if code.stage != name or f"stages/{name}.py" not in code.files:
            yield f"{paths.CODE}/{name}.json does not name stages/{name}.py"
    known = known_code.known_codes(rebuild)
    differing = _differing_files(rebuild, next(known))
    count = f"{len(digests)} files of code of {len(rebuild.code)} stages"
    if not differing:
        return f"{count} are those at hand"
    for commit in known:
        for file in _differing_files(rebuild, commit):
            yield f"{file} is not what {commit.name} holds"
        return f"{count} are those of {commit.name}; {len(differing)} differ from the code at hand"
    if rebuild.bundle or (rebuild.folder / rebuild.recipe.root).resolve() != known_code.REPOSITORY:
        revision = f"commit {rebuild.commit[:10]}" if rebuild.commit else "the revision that was run"
        raise Skip(f"{format_some(differing)} differ from the code at hand, and {revision} is not here: check it out")
    yield f"{format_some(differing)}: not what {paths.CODE} says was run. `dvc repro` runs what changed"
    return ""


def _differing_files(rebuild: Artifact, known: KnownCode) -> list[str]:
    """The files of code that build/code lacks, or names with another digest, or names and this code does not run; and
    its own files for stages that are missing or unknown.
    """
    named = {name: code.files for name, code in rebuild.code.items()}
    differing = [f"{paths.CODE}/{name}.json" for name in named.keys() ^ known.files.keys()]
    for name in named.keys() & known.files.keys():
        differing += differing_keys(named[name], known.files[name])
    return sorted(set(differing))


@check("lock/libraries")
def check_libraries(rebuild: Artifact) -> Check:
    """The lock files of the libraries are those that the stages ran with, and the recipe's one names the versions that
    were installed.
    """
    folders = [dep for stage in rebuild.lock.values() for dep in stage.deps if is_library_locks(dep.path)]
    if len(folders) != 1:
        yield f"dvc.lock names {len(folders)} folders of library lock files; one is expected: requirements, of `code`"
        return ""
    (folder,) = folders
    name = f"{folder.path}/{rebuild.recipe.requirements}.txt"
    here = rebuild.folder / (bundles.LIBRARIES if rebuild.bundle else folder.path)
    file = here / f"{rebuild.recipe.requirements}.txt"
    if not rebuild.bundle and posixpath.normpath(folder.path) != posixpath.normpath(
        posixpath.join(rebuild.recipe.root, bundles.LIBRARIES)
    ):
        yield f"dvc.lock names {folder.path}, which is not the folder requirements of this recipe's code"
        return ""
    if not file.is_file():
        yield f"{name} does not exist"
        return ""
    if hashing.digest_path(here).md5 != folder.md5:
        yield f"{folder.path} is not the one that dvc.lock says the stages ran with"
        return ""
    locked = import_closure.locked_libraries(file)
    for code in rebuild.code.values():
        for library, version in code.libraries.items():
            if locked.get(library) != version:
                yield f"{code.stage}: {paths.CODE} has another {library} {version.version} than {name}"
    for stage, record in rebuild.records.items():
        needed = set(rebuild.code[stage].libraries if stage in rebuild.code else ())
        if missing := sorted(name for name in needed if not record.libraries.get(name)):
            yield f"the record of {stage} does not say which {format_some(missing)} was installed"
        for library, installed in record.libraries.items():
            if installed and (library not in locked or locked[library].version != installed):
                expected = locked[library].version if library in locked else "no version"
                yield f"{stage} ran with {library} {installed}, {name} has {expected}"
    if not rebuild.records:
        return f"{name} is the one of dvc.lock; no record says what was installed"
    named = {library for record in rebuild.records.values() for library in record.libraries}
    return (
        f"{name}: {len(locked)} libraries, of which {len(named)} were installed as locked in {len(rebuild.records)} "
        "recorded stages"
    )


@check("lock/loaded")
def check_loaded(rebuild: Artifact) -> Check:
    """What each stage loaded are the files of the locked wheels, and nothing else."""
    recipe_lock = f"{rebuild.recipe.requirements}.txt"
    folders = [dep for stage in rebuild.lock.values() for dep in stage.deps if is_library_locks(dep.path)]
    folder = rebuild.folder / (bundles.LIBRARIES if rebuild.bundle or not folders else folders[0].path)
    lock, listed = folder / recipe_lock, folder / import_closure.records_filename(rebuild.recipe.requirements)
    if not lock.is_file():
        raise Skip(f"{bundles.LIBRARIES}/{recipe_lock} does not exist")
    locked, wheels = import_closure.locked_libraries(lock), import_closure.read_records(listed)
    silent, files, notes = [], 0, set()
    for stage, record in rebuild.records.items():
        loaded = record.loaded
        if loaded is None:
            if record.format != stage_record.FORMATS[0]:
                yield f"the record of {stage} does not say what was loaded"
            silent.append(stage)
            continue
        files += loaded.files
        yield from (f"{stage} ran with a file that its wheel did not install: {each}" for each in loaded.changed)
        for name in sorted(record.libraries.keys() - loaded.records.keys()):
            yield f"the record of {stage} has no list of the files of {name}"
        for name, digest in sorted(loaded.records.items()):
            if wheels.get(name, digest) != digest:
                yield f"{stage} ran with other files of {name} than those of the locked wheel"
        for name, version in sorted(loaded.others.items()):
            if name != import_closure.DISTRIBUTION and (name not in locked or locked[name].version != version):
                yield f"{stage} loaded {name} {version}, which {recipe_lock} does not have"
        if loaded.foreign:
            yield f"{stage} loaded modules that belong to no library: {format_some(loaded.foreign)}"
        starts = [name for name in loaded.startup if name not in HARMLESS_STARTUP]
        if starts:
            yield f"Python ran code of no library when {stage} began: {format_some(starts)}"
        forcing = [name for name in loaded.variables if name in FORCING_VARIABLES]
        if forcing:
            yield f"{stage} was started with {format_some(forcing)}, which loads other code into every program"
        notes |= {*loaded.startup, *loaded.variables}
    if silent:
        raise Skip(
            f"the records of {format_some(silent)} are of an earlier version, which did not record what was loaded"
        )
    if not rebuild.records:
        raise Skip("no record says what was loaded")
    if not wheels:
        raise Skip(
            f"{files:,} files are as their wheels installed them; {bundles.LIBRARIES}/{listed.name} does not exist, so "
            "the wheels themselves are not compared"
        )
    return f"{files:,} files that the stages loaded are those of the locked wheels ({len(wheels)} lists of files)" + (
        f"; set or run at the start: {', '.join(sorted(notes))}" if notes else ""
    )


@check("lock/pins", paths.INPUTS)
def check_pins(rebuild: Artifact) -> Check:
    """inputs.json has each input that params.yaml pins and a stage reads, and no other, in the order of the pins, with
    the pinned size and sha256. How a file is known, and which may be missing, follows from params.yaml alone.
    """
    if not rebuild.inputs:
        if rebuild.output("inputs.json"):
            yield f"{paths.INPUTS} is not a list of inputs"
        raise Skip(f"{paths.INPUTS} does not exist")
    manifest = json.loads(read_regular(rebuild.folder / paths.INPUTS, MAX_INPUTS))
    if manifest.keys() != {"inputs", "start"} or manifest["start"] != rebuild.recipe.merge.start:
        yield f"{paths.INPUTS} has another start than merge.start in params.yaml, or other keys than download writes"
    expected = _expected_inputs(rebuild)
    if rebuild.recipe.download.images == "selected" and not {"database", "tars", "index"} <= expected.keys():
        yield "params.yaml has download.images: selected, and does not pin database or posts, tars, and their index"
    for pin in (pin for listed in expected.values() for pin in listed.files if pin.url.startswith("hf://")):
        if pins.hub_file(pin).revision is None:
            yield f"{pin.url} names no revision, and the file there may change"
    whole = 0
    for name in sorted(expected.keys() | manifest["inputs"].keys()):
        inputs, entry = expected.get(name), manifest["inputs"].get(name, [])
        entries = entry if isinstance(entry, list) else [entry]
        pinned = {pin.url: pin for pin in inputs.files} if inputs else {}
        found = [each["url"] for each in entries]
        for url in sorted(set(found) - pinned.keys()):
            yield f"{url} is in inputs.json and not pinned, or no stage reads it"
        for url in sorted(pinned.keys() - set(found)):
            yield f"{url} is pinned and not in inputs.json"
        if inputs and set(found) == pinned.keys():
            if found != list(pinned) or isinstance(entry, list) != inputs.several:
                yield f"inputs.json lists the files of {name} twice, in another order or another form than the pins"
            for each in entries:
                pin = pinned[each["url"]]
                whole += len(pin.sha256 or "") == 64
                yield from _entry_faults(each, pin, inputs.known or pins.pin_strength(pin))
    rest = len(rebuild.inputs) - whole
    return f"{len(rebuild.inputs)} inputs as pinned, {whole} of them by a whole sha256" + (
        f"; {rest} others as the first download recorded them" if rest else ""
    )


@dataclass(frozen=True)
class ExpectedInput:
    """An input as inputs.json must have it. known: how all its files are known; None: each by its own pin."""

    files: list[Pin]
    several: bool
    known: str | None = None


def _expected_inputs(rebuild: Artifact) -> dict[str, ExpectedInput]:
    """The inputs that download writes into inputs.json, by name. Raises UserError if a list of pins is not the pinned
    one.
    """
    recipe = rebuild.recipe
    unread = pins.unread_inputs(recipe)
    expected = {
        name: ExpectedInput(
            pins.expand_input(name, listed, rebuild.folder),
            isinstance(listed, list),
            inputs_manifest.MEMBERS if is_sparse(recipe, name) else None,
        )
        for name, listed in recipe.download.inputs.items()
        if name not in unread
    }
    for pin in expected["posts"].files if "posts" in expected else []:
        database = Pin(url=f"{pin.url}#{posts_json.DATABASE}", bytes=None, sha256=None)
        expected["database"] = ExpectedInput([database], False, inputs_manifest.CONVERTED)
    return expected


def is_sparse(recipe: Recipe, name: str) -> bool:
    """Whether the files of this input are tars with holes, of which only the selected members were downloaded."""
    return name == "tars" and recipe.download.images == "selected"


def _entry_faults(entry: dict[str, Any], pin: Pin, known: str) -> Iterator[str]:
    """A sparse tar has the size and the sha256 of the whole tar, which its index names."""
    keys = {"path", "bytes", "sha256", "url", "pinned"} | ({"members"} if known == inputs_manifest.MEMBERS else set())
    if entry.keys() != keys or entry["pinned"] != known:
        yield f"{pin.url}: inputs.json says “{entry.get('pinned')}” or has other keys; by params.yaml it is “{known}”"
    size, sha256 = entry["bytes"], entry["sha256"]
    if type(size) is not int or size != (pin.bytes or size) or not sha256.startswith(pin.sha256 or ""):
        yield f"{pin.url} has another size or sha256 than params.yaml pins"
    if not SHA256.fullmatch(sha256):
        yield f"{pin.url}: inputs.json has no whole sha256 of it"


@check("lock/data")
def check_data(rebuild: Artifact, hashed: bool) -> Check:
    """The inputs are where inputs.json says, with the right sizes; with `hashed` their content is compared too."""
    if rebuild.bundle:
        raise Skip("a bundle holds no inputs")
    files = [Path(posixpath.normpath(rebuild.folder / paths.BUILD / entry["path"])) for entry in rebuild.inputs]
    present = [(path, entry) for path, entry in zip(files, rebuild.inputs, strict=True) if path.is_file()]
    if not present:
        raise Skip("the inputs are not on this machine" if files else f"no {paths.INPUTS} says where the inputs are")
    for path in files:
        if not path.is_file():
            yield f"{path} does not exist"
    for path, entry in present:
        if path.stat().st_size != entry["bytes"]:
            yield f"{path} has another size than inputs.json says, {entry['bytes']:,} bytes"
    total = sum(path.stat().st_size for path, _ in present)
    if not hashed:
        raise Skip(f"{len(present)} inputs have the right sizes and were not read; --data hashes their {total:,} bytes")
    known = [
        (path, entry["sha256"])
        for path, entry in present
        if path.stat().st_size == entry["bytes"] and not is_sparse(rebuild.recipe, entry["name"])
    ]
    if not known:
        raise Skip("no input has the size that inputs.json says, or all are tars with holes, which have no sha256")
    digests = hashing.digest_paths((path for path, _ in known), md5=False)
    for (path, sha256), digest in zip(known, digests, strict=True):
        if digest.sha256 != sha256:
            yield f"{path} is not what the download stage verified"
    total = sum(digest.bytes for digest in digests)
    sparse = sum(is_sparse(rebuild.recipe, entry["name"]) for entry in rebuild.inputs)
    return f"{len(known)} inputs hashed again, {total:,} bytes" + (
        f"; not hashed: {sparse} tars with holes, whose members only their indexes know" if sparse else ""
    )
