"""The checks lock/code, libraries, pins and data: what the stages ran and read from outside the pipeline."""

import os
import posixpath
import re
import subprocess
from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.hub import inputs_manifest, pins
from kohaku_delta.provenance import bundles, import_closure, stage_record
from kohaku_delta.provenance.artifact import REPOSITORY, Artifact, is_library_locks
from kohaku_delta.regular_files import read_regular
from kohaku_delta.verify.findings import Check, Skip, check, format_some

MAX_CODE = 4 << 20  # bytes of a file of code
# what an installer of Python or a distribution of Linux puts there; the record names it, and the line repeats it
HARMLESS_STARTUP = {"_virtualenv.pth", "sitecustomize"}  # a sitecustomize outside of Python's own folder is foreign
FORCING_VARIABLES = {"LD_AUDIT", "LD_PRELOAD"}


@check("lock/code", paths.CODE)
def check_code(rebuild: Artifact) -> Check:
    """build/code describes the code at hand, or that of the commit that the records name."""
    digests: dict[str, str] = {}
    for code in rebuild.code.values():
        if conflicting := [file for file, digest in code.files.items() if digests.setdefault(file, digest) != digest]:
            files = format_some(conflicting)
            yield f"{files} differed between {code.stage} and another stage: run `dvc repro` to its end"
    if not digests:
        raise Skip(f"{paths.CODE} does not exist: the stage `code` has not run here")
    if outside := [file for file in digests if not file.startswith(("src/", "stages/")) or ".." in file.split("/")]:
        yield f"{paths.CODE} names code outside of src/ and stages/: {format_some(outside)}"
        return ""
    repository = REPOSITORY if rebuild.bundle else rebuild.folder / rebuild.recipe.root
    present = {file: read_regular(repository / file, MAX_CODE) for file in digests if (repository / file).is_file()}
    differing = _differing(digests, present)
    if not differing:
        return f"{len(digests)} files of code are those at hand"
    commit = rebuild.commit
    committed = _committed_files(repository, commit, list(digests)) if commit else None
    if commit and committed is not None:
        for file in _differing(digests, committed):
            yield f"{file} is not what commit {commit[:10]} holds"
        return (
            f"{len(digests)} files of code are those of commit {commit[:10]}; "
            f"{len(differing)} differ from the code at hand"
        )
    if rebuild.bundle:
        revision = f"commit {commit[:10]}" if commit else "the revision that was run"
        raise Skip(f"{format_some(differing)} differ from the code at hand, and {revision} is not here: check it out")
    yield f"{format_some(differing)}: not what {paths.CODE} says was run. `dvc repro` runs what changed"
    return ""


def _differing(digests: dict[str, str], contents: dict[str, bytes]) -> list[str]:
    """The files whose content does not have the digest of build/code."""

    def digest(file: str) -> str | None:
        try:
            return import_closure.file_digest(file, contents[file]) if file in contents else None
        except UserError:  # not Python that can be parsed
            return None

    return [file for file, expected in digests.items() if digest(file) != expected]


def _committed_files(repository: Path, commit: str, files: list[str]) -> dict[str, bytes] | None:
    """File → its content in the commit, without those that the commit lacks. None without git, or without the commit.

    Only objects that are here are read: git fetches nothing.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str, stdin: str = "") -> bytes:
        return subprocess.run(
            ["git", "-C", str(repository), *arguments],
            input=stdin.encode(),
            capture_output=True,
            check=True,
            env=environment | {"GIT_NO_LAZY_FETCH": "1"},
        ).stdout

    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
        output = git("cat-file", "--batch", stdin="".join(f"{commit}:{file}\n" for file in files))
    except (OSError, subprocess.CalledProcessError):
        return None
    contents, position = {}, 0
    for file in files:  # per file: `<id> blob <size>\n<content>\n`, or one line that says it is missing
        header, _, _ = output[position:].partition(b"\n")
        position += len(header) + 1
        match header.split():
            case [_, b"blob", size]:
                contents[file] = output[position : position + int(size)]
                position += int(size) + 1
    return contents


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
    """inputs.json has each pinned input, with the pinned size and sha256. Of a span of files without a list only the
    names are pinned.
    """
    if not rebuild.inputs:
        if rebuild.output("inputs.json"):
            yield f"{paths.INPUTS} is not a list of inputs"
        raise Skip(f"{paths.INPUTS} does not exist")
    unread = pins.unread_inputs(rebuild.recipe)
    pinned: set[str] = set()
    whole = 0
    for name, listed in rebuild.recipe.download.inputs.items():
        for place, pin in enumerate(listed if isinstance(listed, list) else [listed]):
            span = pins.SPAN.search(pin.url)
            folder = pin.url[: pin.url.rindex("/", 0, span.start()) + 1] if span else ""
            rows: dict[str, tuple[int, str | None]] = {}
            if span and pin.sha256:  # the pin is that of pins-<input>.csv
                try:
                    rows = pins.read_pin_list(paths.pin_list_path(rebuild.folder, name, place), pin)
                except UserError as error:
                    yield error.message.replace(f"{rebuild.folder}/", "")
            urls = _url_pattern(pin.url, span)
            entries = [entry for entry in rebuild.inputs if entry["name"] == name and urls.fullmatch(entry["url"])]
            if not entries and name not in unread:
                yield f"{pin.url} is pinned and not in inputs.json"
            for entry in entries:
                url = entry["url"]
                pinned.add(url)
                size, sha256 = rows.get(url[len(folder) :], (None, None)) if span else (pin.bytes, pin.sha256)
                whole += len(sha256 or "") == 64
                same = entry["sha256"].startswith(sha256 or "") and entry["bytes"] == (size or entry["bytes"])
                if not same and entry.get("pinned") != "members":  # a sparse tar has no sha256 of its own
                    yield f"{url} has another size or sha256 than params.yaml pins"
    for entry in rebuild.inputs:
        made_of = entry["url"].rpartition("#")[0]  # the database that download made of posts.json
        converted = entry.get("pinned") == inputs_manifest.CONVERTED and entry["name"] == "database"
        if entry["url"] not in pinned and not (converted and made_of in pinned):
            yield f"{entry['url']} is in inputs.json and not pinned"
    rest = len(rebuild.inputs) - whole
    return f"{len(rebuild.inputs)} inputs as pinned, {whole} of them by a whole sha256" + (
        f"; {rest} others as the first download recorded them" if rest else ""
    )


def _url_pattern(url: str, span: re.Match[str] | None) -> re.Pattern[str]:
    """Matches the urls that a pin names: its own, or those of its span of numbers."""
    if span is None:
        return re.compile(re.escape(url))
    return re.compile(rf"{re.escape(url[: span.start()])}\d+{re.escape(url[span.end() :])}")


@check("lock/data")
def check_data(rebuild: Artifact, hashed: bool) -> Check:
    """The inputs lie where inputs.json says, with the right sizes; with `hashed` their content is compared too."""
    if rebuild.bundle:
        raise Skip("a bundle holds no inputs")
    files = [Path(posixpath.normpath(rebuild.folder / paths.BUILD / entry["path"])) for entry in rebuild.inputs]
    present = [(path, entry) for path, entry in zip(files, rebuild.inputs, strict=True) if path.is_file()]
    if not present:
        raise Skip("the inputs are not on this machine" if files else f"no {paths.INPUTS} says where the inputs lie")
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
        if len(entry["sha256"]) == 64 and path.stat().st_size == entry["bytes"]
    ]
    digests = hashing.digest_paths((path for path, _ in known), md5=False)
    for (path, sha256), digest in zip(known, digests, strict=True):
        if digest.sha256 != sha256:
            yield f"{path} is not what the download stage verified"
    return f"{len(known)} inputs hashed again, {total:,} bytes"
