"""Invariant: dvc.lock is believed for nothing that can be looked at: what it says of outs, inputs, code and parameters
is compared with them.

DVC itself takes an out's md5 from the lock unread (`repro --dry --allow-missing`) and hashes a dependency after the
command ran; these checks look.
"""

import csv
import posixpath
import re
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.parallel import ordered_map
from kohaku_delta.provenance import bundles, dvc_yaml, git_blobs, import_closure
from kohaku_delta.verify.artifact import ROOT, Artifact, commit, verified_inputs
from kohaku_delta.verify.findings import FAIL, PASS, SKIP, Finding, format_some, pass_or_fail

GROUP = "lock"
SPAN = re.compile(r"\{\d+\.\.\d+\}")  # data-{0000..2000}.tar stands for many files


def check_bundle(rebuild: Artifact) -> Finding:
    """Each file of a bundle is the one that was packed."""
    listed, folder = rebuild.bundle.files, rebuild.folder
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"bundle.json"}
    faults = [f"{place} is not in the bundle, whose list names it" for place in sorted(listed.keys() - there)]
    faults += [f"{place} is in the bundle and its list does not name it" for place in sorted(there - listed.keys())]
    shared = sorted(there & listed.keys())
    for place, digest in zip(shared, hashing.digest_paths((folder / place for place in shared), md5=False)):
        if digest.sha256 != listed[place]:
            faults.append(f"{place} was changed after it was packed")
    return pass_or_fail(GROUP, "bundle", faults, f"its {len(listed)} files are those that were packed")


def check_declarations(rebuild: Artifact) -> Finding:
    """The lock has the stages, commands, inputs and outs of dvc.yaml."""
    faults = [
        f"dvc.lock has a stage {name}, which dvc.yaml does not declare"
        for name in rebuild.lock
        if name not in rebuild.stages
    ]
    missing = [name for name in rebuild.stages if name not in rebuild.lock]
    for name in missing:
        faults += [
            f"{out} lies there and dvc.lock has no stage {name}"
            for out in rebuild.stages[name].outs
            if (rebuild.folder / out).exists()
        ]
    for name, stage in rebuild.stages.items():
        if name in rebuild.lock:
            locked = rebuild.lock[name]
            faults += (
                [f"{name}: dvc.lock ran “{locked.cmd}”, dvc.yaml says “{stage.command}”"]
                if locked.cmd != stage.command
                else []
            )
            for what, said, declared_ in (("inputs", locked.deps, stage.deps), ("outs", locked.outs, stage.outs)):
                other = sorted({posixpath.normpath(each.path) for each in said} ^ set(declared_))
                faults += (
                    [f"{name}: dvc.lock and dvc.yaml name other {what}: {format_some(other)}"]
                    if other or len(said) != len(declared_)
                    else []
                )
    if missing and not faults:
        return Finding(GROUP, "pipeline", SKIP, f"not finished: dvc.lock has no stage {', '.join(missing)}")
    return pass_or_fail(
        GROUP,
        "pipeline",
        faults,
        f"{len(rebuild.lock)} stages with the commands, inputs and outs that dvc.yaml declares",
    )


def check_parameters(rebuild: Artifact) -> Finding:
    """params.yaml says what the lock says that the stages were told."""
    faults, count = [], 0
    for name, stage in rebuild.stages.items():
        if name in rebuild.lock:
            ours, locked = dvc_yaml.parameters(rebuild.values, stage.params), rebuild.lock[name].parameters
            count += len(ours)
            faults += [
                f"{name}: {key} in params.yaml is not what dvc.lock says"
                for key in sorted(ours.keys() | locked.keys())
                if not _same(ours, locked, key)
            ]
    return pass_or_fail(GROUP, "parameters", faults, f"{count} sections of params.yaml are as the stages were told")


def _same(ours: dict, locked: dict, key: str) -> bool:
    return key in ours and key in locked and repr(ours[key]) == repr(locked[key])


def check_links(rebuild: Artifact) -> Finding:
    """A lock edited at one place contradicts itself: what a stage read has the hash that its writer wrote, and one file
    has one hash.
    """
    written = {
        posixpath.normpath(each.path): (name, each) for name, stage in rebuild.lock.items() for each in stage.outs
    }
    seen, faults, count = {}, [], 0
    for name, stage in rebuild.lock.items():
        for dep in stage.deps:
            path = posixpath.normpath(dep.path)
            if path in written:
                writer, out = written[path]
                count += 1
                faults += (
                    [f"{name} read {path} with md5 {dep.md5[:8]}…, {writer} wrote it with {out.md5[:8]}…"]
                    if (dep.md5, dep.size) != (out.md5, out.size)
                    else []
                )
            elif path in rebuild.writers:
                faults.append(f"{name} read {path}, and dvc.lock has no stage {rebuild.writers[path]} that wrote it")
            elif seen.setdefault(path, dep.md5) != dep.md5:
                faults.append(
                    f"{name} ran with another {path} than an earlier stage: dvc repro was not run to its end after it was changed"
                )
    return pass_or_fail(
        GROUP,
        "links",
        faults,
        f"{count} inputs have the hashes that their stages wrote, {len(seen)} files of the repository one hash each",
    )


def check_outputs(rebuild: Artifact) -> list[Finding]:
    """Every out that is there has the md5 of the lock."""
    faults, done, left = [], [], []
    for name, stage in rebuild.lock.items():
        for out in stage.outs:
            path = posixpath.normpath(out.path)
            if path not in rebuild.writers:
                continue
            if path in rebuild.digests:
                done.append(path)
                found = rebuild.digests[path]
                faults += (
                    [f"{path} (of {name}) has md5 {found.md5[:8]}…, dvc.lock says {out.md5[:8]}…"]
                    if (found.md5, found.bytes) != (out.md5, out.size)
                    else []
                )
            elif rebuild.bundle and path in rebuild.bundle.left_out:
                left.append(path)
            else:
                faults.append(f"{path} (of {name}) is not there")
    total = sum(each.bytes for each in rebuild.digests.values())
    found = (
        [pass_or_fail(GROUP, "outs", faults, f"{len(done)} outs re-hashed, {total:,} bytes: as dvc.lock says")]
        if done or faults
        else []
    )
    return found + (
        [
            Finding(
                GROUP,
                "weights",
                SKIP,
                f"not in the bundle, so only what is said of them can be compared: {', '.join(left)}",
            )
        ]
        if left
        else []
    )


def check_code(rebuild: Artifact) -> Finding:
    """The code at hand, or that of the recorded commit, is what build/code says that the stages ran."""
    said: dict[str, str] = {}
    for each in rebuild.code.values():
        if other := [place for place, digest in each.files.items() if said.setdefault(place, digest) != digest]:
            return Finding(
                GROUP,
                "code",
                FAIL,
                f"{format_some(other)} had other contents in {each.stage} than in another stage: `dvc repro` was not run to its end",
            )
    if not said:
        return Finding(GROUP, "code", SKIP, f"{import_closure.FOLDER} is not there: the stage `code` has not run here")
    if strange := [place for place in said if not place.startswith(("src/", "stages/")) or ".." in place.split("/")]:
        return Finding(
            GROUP,
            "code",
            FAIL,
            f"{import_closure.FOLDER} names code outside of src/ and stages/: {format_some(strange)}",
        )
    base = ROOT if rebuild.bundle else rebuild.folder / rebuild.recipe.root
    other = [
        place
        for place, digest in said.items()
        if _digest(place, (base / place).read_bytes() if (base / place).is_file() else None) != digest
    ]
    if not other:
        return Finding(GROUP, "code", PASS, f"{len(said)} files of code are those at hand")
    named = commit(rebuild)
    if named and (blobs := git_blobs.committed_files(base, named, list(said))) is not None:
        faults = [
            f"{place} is not what commit {named[:10]} holds"
            for place, digest in said.items()
            if _digest(place, blobs.get(place)) != digest
        ]
        if not faults and rebuild.bundle:
            return Finding(
                GROUP,
                "code",
                PASS,
                f"{len(said)} files of code are those of commit {named[:10]}, which the records name ({len(other)} differ from the code at hand)",
            )
        if faults:
            return pass_or_fail(GROUP, "code", faults, "")
    if rebuild.bundle:
        return Finding(
            GROUP,
            "code",
            SKIP,
            f"{format_some(other)} differ from the code at hand, and {f'commit {named[:10]}' if named else 'what was run'} is not here: check it out, and audit again",
        )
    return Finding(
        GROUP,
        "code",
        FAIL,
        f"{format_some(other)}: not what {import_closure.FOLDER} says was run. `dvc repro` runs what changed",
    )


def _digest(place: str, content: bytes | None) -> str | None:
    """As build/code has it; None for a file that is not there or cannot be read."""
    try:
        return None if content is None else import_closure.file_digest(place, content)
    except UserError:
        return None


def check_libraries(rebuild: Artifact) -> Finding:
    """The locks of the libraries are those that the stages ran under, and they had what the recipe's one names."""
    said = [
        dep for stage in rebuild.lock.values() for dep in stage.deps if rebuild.libraries(posixpath.normpath(dep.path))
    ]
    if len(said) != 1:
        return Finding(
            GROUP,
            "libraries",
            FAIL,
            f"dvc.lock names {len(said)} folders of the libraries' locks instead of one: requirements, which `code` depends on",
        )
    folder, md5 = posixpath.normpath(said[0].path), said[0].md5
    path = f"{folder}/{rebuild.recipe.requirements}.txt"
    there = rebuild.folder / (bundles.LIBRARIES if rebuild.bundle else folder)
    file = there / f"{rebuild.recipe.requirements}.txt"
    if not file.is_file():
        return Finding(GROUP, "libraries", FAIL, f"{path} is not there")
    if hashing.digest_path(there).md5 != md5:
        return Finding(GROUP, "libraries", FAIL, f"{folder} is not the one that dvc.lock says the stages ran under")
    locked = import_closure.locked_libraries(file)
    faults = [
        f"{each.stage}: {import_closure.FOLDER} says {name} {library.version}, with other hashes or another version than {path}"
        for each in rebuild.code.values()
        for name, library in each.libraries.items()
        if locked.get(name) != library
    ]
    faults += [
        f"{name} ran with {library} {version}, the lock says {locked[library].version if library in locked else None}"
        for name, each in rebuild.records.items()
        for library, version in each.libraries.items()
        if version
        and (library not in locked or locked[library].version != version)  # what was not installed was not used
    ]
    if not rebuild.records:
        return pass_or_fail(
            GROUP, "libraries", faults, f"{path} is the one of dvc.lock; no record says what was installed"
        )
    return pass_or_fail(
        GROUP,
        "libraries",
        faults,
        f"{path}: {len(locked)} libraries, installed as locked in {len(rebuild.records)} recorded stages",
    )


def check_pins(rebuild: Artifact) -> Finding:
    """inputs.json has each pinned input, with the pinned size and sha256; of a span of files without a list the names
    alone are pinned.
    """
    entries = verified_inputs(rebuild)
    if not entries:
        there = rebuild.out("inputs.json")
        return Finding(
            GROUP,
            "pins",
            FAIL if there else SKIP,
            f"build/inputs.json is {'no list of inputs' if there else 'not there'}",
        )
    recipe, faults, whole, seen = rebuild.recipe, [], 0, set()
    unused = {"index"} | ({"delta_base"} if recipe.merge.start == "merge" else {"gamma", "beta"})
    for name, pins in recipe.download.inputs.items():
        listed = [each for each in entries if each["name"] == name]
        for pin in pins if isinstance(pins, list) else [pins]:
            span = re.compile(r"\d+".join(map(re.escape, SPAN.split(pin.url))))
            rows, fault = _rows(rebuild, name, pin)
            faults += [fault] if fault else []
            found = [each for each in listed if span.fullmatch(each["url"])]
            seen |= {each["url"] for each in found}
            if not found and name not in unused:
                faults.append(f"{pin.url} is pinned and not in inputs.json")
            for each in found:
                size, sha256 = (
                    rows.get(each["url"].rpartition("/")[2], (None, None))
                    if rows is not None
                    else (pin.bytes, pin.sha256)
                )
                whole += len(sha256 or "") == 64
                if each.get("pinned") != "members" and (
                    not each["sha256"].startswith(sha256 or "") or (size or each["bytes"]) != each["bytes"]
                ):
                    faults.append(f"{each['url']} has another size or sha256 than params.yaml pins")
    faults += [f"{each['url']} is in inputs.json and not pinned" for each in entries if each["url"] not in seen]
    left = f"; {len(entries) - whole} others as the first download recorded them" if whole < len(entries) else ""
    return pass_or_fail(
        GROUP, "pins", faults, f"{len(entries)} inputs as pinned, {whole} of them by a whole sha256{left}"
    )


def _rows(rebuild: Artifact, name: str, pin) -> tuple[dict | None, str | None]:
    """file → (bytes, sha256) of the list that pins a span (pins-<input>.csv, whose own sha256 the pin has), and what is
    wrong with it.

    {} for a span without a list, None for a single file.
    """
    if not SPAN.search(pin.url):
        return None, None
    path = rebuild.folder / f"pins-{name}.csv"
    if not pin.sha256:
        return {}, None
    if not path.is_file() or hashing.digest_path(path, md5=False).sha256 != pin.sha256:
        return {}, f"{path.name} is {'not the list that params.yaml pins' if path.is_file() else 'not there'}"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {
                row["file"].rpartition("/")[2]: (int(row["bytes"]), row["sha256"] or None)
                for row in csv.DictReader(file)
            }, None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
        return {}, f"{path.name} is no list of pins (file,bytes,sha256)"


def check_data(rebuild: Artifact, hashed: bool) -> Finding:
    """The inputs lie where inputs.json says; with `hashed` they are read."""
    entries = verified_inputs(rebuild)
    if rebuild.bundle or not entries:
        return Finding(
            GROUP,
            "data",
            SKIP,
            "a bundle holds no inputs" if rebuild.bundle else "no build/inputs.json says where the inputs lie",
        )
    places = [Path(posixpath.normpath(rebuild.folder / "build" / each["path"])) for each in entries]
    if not any(place.is_file() for place in places):
        return Finding(GROUP, "data", SKIP, "the inputs are not on this machine")
    faults = [f"{place} is not there" for place in places if not place.is_file()]
    there = [(place, each) for place, each in zip(places, entries) if place.is_file()]
    faults += [
        f"{place} has {place.stat().st_size:,} bytes, inputs.json says {each['bytes']}"
        for place, each in there
        if place.stat().st_size != each["bytes"]
    ]
    total = sum(place.stat().st_size for place, _ in there)
    if not hashed and not faults:
        return Finding(
            GROUP,
            "data",
            SKIP,
            f"{len(there)} inputs lie there with the right sizes and were not read; --data hashes their {total:,} bytes",
        )
    if hashed:
        known = [(place, each["sha256"]) for place, each in there if len(each["sha256"]) == 64]
        found = ordered_map(lambda item: hashing.digest_path(item[0], md5=False).sha256, known)
        faults += [
            f"{place} is not what the download stage verified"
            for (place, said), sha256 in zip(known, found)
            if sha256 != said
        ]
        there = known
    return pass_or_fail(GROUP, "data", faults, f"{len(there)} inputs re-hashed, {total:,} bytes")
