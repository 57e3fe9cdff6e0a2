"""Reads and writes inputs.json, which names every verified input once: its path, size and sha256.

An input is opened through this module, which first compares its size, then its times with those of its last hashing
(verified_files), and its sha256 if a time differs. A file that differs is refused and named.

inputs.json is the same on every host: paths are relative to its folder, and hf:// inputs are always in the recipe's own
mirror (files of another mirror are linked there). Only an absolute path in params.yaml stays absolute. `pinned` says
how each file was known: "sha256", "prefix <digits>", "recorded" (only this run says what it is), "members" (a sparse
tar) or "converted" (made here from the input that its url names); `start` says where the base comes from.
"""

import json
import os
from collections import Counter
from pathlib import Path

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.hub import progress, verified_files
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.parallel import ordered_map

CONVERTED, MEMBERS = "converted", "members"
PINNED = {
    "sha256": "as pinned",
    "recorded": "without a pin, recorded here",
    MEMBERS: "in part, each member by the public index",
    CONVERTED: "converted from another input",
}


def write(entries: dict, folder: Path, start: str, path) -> None:
    """entries: input name → {path, bytes, sha256, url, pinned, stamp} or a list of them; relative paths are relative to
    `folder`. start: merge.start of the recipe.
    """
    path, stamps = Path(path), {}

    def listed(entry: dict) -> dict:
        place = entry["path"] if os.path.isabs(entry["path"]) else os.path.relpath(folder / entry["path"], path.parent)
        stamps[place] = VerifiedFile(entry["sha256"], entry["stamp"])
        return {key: value for key, value in entry.items() if key != "stamp"} | {"path": place}

    inputs = {
        name: [listed(each) for each in entry] if isinstance(entry, list) else listed(entry)
        for name, entry in entries.items()
    }
    with atomic_files.atomic_write(path, "w") as file:
        json.dump({"inputs": inputs, "start": start}, file, indent=1, sort_keys=True)
        file.write("\n")
    verified_files.write_stamps(path, stamps)


def path(manifest, name: str) -> Path:
    """Path of the input `name`, after it was compared with what was verified."""
    return _verified_paths(Path(manifest), name, [_entry(manifest, name)])[0]


def paths(manifest, name: str) -> list[Path]:
    """The same for an input of several files (the tars), in the order of the pins."""
    return _verified_paths(Path(manifest), name, _entry(manifest, name))


def optional_path(manifest, name: str) -> Path | None:
    """The same for an input that a recipe may leave out: None if it is not listed."""
    return path(manifest, name) if name in _inputs(Path(manifest)) else None


def optional_paths(manifest, name: str) -> list[Path]:
    """The same for an input of several files that a recipe may leave out: empty if it is not listed."""
    return paths(manifest, name) if name in _inputs(Path(manifest)) else []


def tokenizer(manifest, name: str, folder: Path | None) -> tuple[Path, Path]:
    """vocab.json and merges.txt of the input `name` ("tokenizer" or "tokenizer_2"), or of a folder given by hand."""
    if folder:
        return Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    return path(manifest, f"{name}_vocab"), path(manifest, f"{name}_merges")


def sha256(manifest, name: str) -> str:
    """The verified sha256 of the input `name`."""
    return _entry(manifest, name)["sha256"]


def sha256s(manifest, name: str) -> list[str]:
    """The same for an input of several files, in the order of the pins."""
    return [entry["sha256"] for entry in _entry(manifest, name)]


def pin_counts(files: list[dict]) -> dict[str, int]:
    """How many of these entries were known in which way."""
    counts = Counter(entry["pinned"] for entry in files)
    return {PINNED.get(pinned, f"by its {pinned}"): count for pinned, count in sorted(counts.items(), reverse=True)}


def _inputs(manifest: Path) -> dict:
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8"))["inputs"])
    except FileNotFoundError:
        raise UserError(
            f"{manifest} does not exist. Run the download stage, or name the input itself by its option."
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{manifest} is not a list of inputs. Run the download stage again.") from None


def _entry(manifest, name: str):
    try:
        return _inputs(Path(manifest))[name]
    except KeyError:
        raise UserError(
            f"{manifest} names no input {name!r}. Add it to download.inputs in params.yaml, "
            "or name the file by its option."
        ) from None


def _verified_paths(manifest: Path, name: str, entries: list[dict]) -> list[Path]:
    """Paths of the files of an input. Raises UserError for one that is not what the download stage verified; hashes
    those whose times changed since.
    """
    files = [(Path(os.path.normpath(manifest.parent / entry["path"])), entry) for entry in entries]
    for file, entry in files:
        if not file.is_file():
            raise UserError(f"{file} is named by {manifest} and does not exist. {_remedy(name, entry)}")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes; {manifest} says {entry['bytes']}. {_remedy(name, entry)}"
            )
    if _changed(manifest, files):
        with verified_files.exclusive(manifest):  # of several ranks one hashes, and the others find its stamps
            _rehash(manifest, name, _changed(manifest, files))
    return [file for file, _ in files]


def _changed(manifest: Path, files: list[tuple[Path, dict]]) -> list[tuple[Path, dict]]:
    """The files whose times are not those of their last hashing."""
    known = verified_files.read_stamps(manifest)
    return [
        (file, entry)
        for file, entry in files
        if known.get(entry["path"]) != VerifiedFile(entry["sha256"], verified_files.stamp(file))
    ]


def _rehash(manifest: Path, name: str, changed: list[tuple[Path, dict]]) -> None:
    for file, entry in changed:
        if entry.get("pinned") == MEMBERS:  # a sparse tar has no sha256 of its own
            raise UserError(
                f"{file} was changed, or copied here, after the download stage verified its members. "
                f"{_remedy(name, entry)}"
            )
    with progress.progress_bar(f"verify {name}", sum(entry["bytes"] for _, entry in changed)) as advance:
        hashed = list(ordered_map(lambda item: verified_files.hash_with_stamp(item[0], advance), changed))
    stamps = verified_files.read_stamps(manifest)
    for (file, entry), found in zip(changed, hashed, strict=True):
        if found.sha256 != entry["sha256"]:
            raise UserError(
                f"{file} was edited or replaced: its sha256 is {found.sha256}, {manifest} says {entry['sha256']}. "
                f"{_remedy(name, entry)}"
            )
        stamps[entry["path"]] = found
    verified_files.write_stamps(manifest, stamps)


def _remedy(name: str, entry: dict) -> str:
    again = "un the download stage again (`dvc repro -f -s download`)"
    if entry.get("pinned") == CONVERTED:
        return f"R{again}: it makes the database again."
    if str(entry.get("url")).startswith("file://"):
        return (
            "Put the file back. If you mean to use this one, change its pin in params.yaml "
            f"(download.inputs.{name}) if it has a sha256 there, and r{again}."
        )
    return f"R{again}: it downloads damaged files again."
