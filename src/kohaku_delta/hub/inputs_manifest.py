"""Invariant: inputs.json names every verified input once: its place, bytes and sha256. An input is opened through this
module, which first compares it: its size, then its times with those of its last hashing (`stamps`); if a time
differs, its sha256. A file that differs is refused and named.

inputs.json is the same on every host: a place is written as seen from the folder of inputs.json, and hf:// inputs
always lie in the recipe's own mirror (what another mirror has is linked there). Only an absolute path in params.yaml
itself stays absolute. `pinned` says how each file was known: "sha256", "prefix <digits>", or "recorded" when nothing
but this run says what it is; `start` says where the base comes from.
"""

import json
import os
from collections import Counter
from pathlib import Path

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.hub import concurrency, verified_files
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.parallel import ordered_map


def write(entries: dict, folder: Path, start: str, path) -> None:
    """entries: input name → {path, bytes, sha256, url, pinned, stamp} or a list of them; relative paths as seen from
    `folder`. start: merge.start of the recipe.
    """
    path, known = Path(path), {}

    def seen(entry: dict) -> dict:
        place = entry["path"] if os.path.isabs(entry["path"]) else os.path.relpath(folder / entry["path"], path.parent)
        known[place] = VerifiedFile(entry["sha256"], entry["stamp"])
        return {key: value for key, value in entry.items() if key != "stamp"} | {"path": place}

    entries = {
        name: [seen(each) for each in entry] if isinstance(entry, list) else seen(entry)
        for name, entry in entries.items()
    }
    with atomic_files.atomic_write(path, "w") as file:
        json.dump({"inputs": entries, "start": start}, file, indent=1, sort_keys=True)
        file.write("\n")
    verified_files.write_stamps(path, known)


def _verified_paths(file: Path, name: str, entries: list[dict]) -> list[Path]:
    """Where the files of an input lie. Refuses one that is not what the download stage verified; reads those whose
    times changed since.
    """
    places = [Path(os.path.normpath(file.parent / entry["path"])) for entry in entries]
    for place, entry in zip(places, entries):
        if not place.is_file():
            raise UserError(f"{place} is named by {file} and is not there. {_remedy(name, entry)}")
        if place.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{place} has {place.stat().st_size} bytes; {file} says {entry['bytes']}. {_remedy(name, entry)}"
            )
    if _changed_paths(file, places, entries):
        with verified_files.exclusive(file):  # of several ranks one hashes, and the others find its stamps
            _rehash(file, name, _changed_paths(file, places, entries))
    return places


def _changed_paths(file: Path, places: list[Path], entries: list[dict]) -> list[tuple[Path, dict]]:
    known = verified_files.read_stamps(file)
    return [
        (place, entry)
        for place, entry in zip(places, entries)
        if known.get(entry["path"]) != VerifiedFile(entry["sha256"], verified_files.stamp(place))
    ]


def _rehash(file: Path, name: str, changed: list[tuple[Path, dict]]) -> None:
    for place, entry in changed:
        if entry.get("pinned") == "members":  # a sparse tar has no sha256 of its own
            raise UserError(
                f"{place} was changed, or copied here, after the download stage verified its members. {_remedy(name, entry)}"
            )
    with concurrency.progress_bar(f"verify {name}", sum(entry["bytes"] for _, entry in changed)) as advance:
        found = list(ordered_map(lambda item: verified_files.hash_with_stamp(item[0], advance), changed))
    for (place, entry), each in zip(changed, found, strict=True):
        if each.sha256 != entry["sha256"]:
            raise UserError(
                f"{place} was edited or replaced: its sha256 is {each.sha256}, {file} says {entry['sha256']}. {_remedy(name, entry)}"
            )
    verified_files.write_stamps(
        file,
        verified_files.read_stamps(file)
        | {entry["path"]: each for (_, entry), each in zip(changed, found, strict=True)},
    )


def _remedy(name: str, entry: dict) -> str:
    again = "run the download stage again (`dvc repro -f -s download`)"
    if str(entry.get("url")).startswith("file://"):
        return f"Put the file back. If you mean to use this one, change its pin in params.yaml (download.inputs.{name}) if it has a sha256 there, and {again}."
    return f"{again[0].upper()}{again[1:]}: it fetches what is damaged."


def _entry(file, name: str):
    file = Path(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))["inputs"][name]
    except FileNotFoundError:
        raise UserError(
            f"{file} is not there. Run the download stage, or name the input itself by its option."
        ) from None
    except (ValueError, TypeError):
        raise UserError(f"{file} is not a list of inputs. Run the download stage again.") from None
    except KeyError:
        raise UserError(
            f"{file} names no input {name!r}. Add it to download.inputs in params.yaml, or name the file by its option."
        ) from None


def path(file, name: str) -> Path:
    """Where the input `name` lies, compared with what was verified."""
    return _verified_paths(Path(file), name, [_entry(file, name)])[0]


def paths(file, name: str) -> list[Path]:
    """The same for an input of several files (the tars), in the order of the pins."""
    return _verified_paths(Path(file), name, _entry(file, name))


def optional_paths(file, name: str) -> list[Path]:
    """The same for an input that a recipe may do without: empty if it is not listed."""
    try:
        listed = json.loads(Path(file).read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, TypeError, KeyError):
        return paths(file, name)  # which says what is wrong with the file
    return paths(file, name) if name in listed else []


def tokenizer(file, name: str, folder: Path | None) -> tuple[Path, Path]:
    """vocab.json and merges.txt of the input `name` ("tokenizer" or "tokenizer_2"), or of a folder given by hand."""
    if folder:
        return Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    return path(file, f"{name}_vocab"), path(file, f"{name}_merges")


def sha256(file, name: str) -> str:
    """The verified sha256 of the input `name`."""
    return _entry(file, name)["sha256"]


def sha256s(file, name: str) -> list[str]:
    """The same for an input of several files, in the order of the pins."""
    return [entry["sha256"] for entry in _entry(file, name)]


def format_counts(files: list[dict]) -> str:
    """How many of these entries were known by what, as a phrase."""
    counts = Counter(each["pinned"] for each in files)
    words = {
        "sha256": "as pinned",
        "recorded": "pinned by nothing: recorded here",
        "members": "in part, each member by the public index",
    }
    return ", ".join(
        f"{count:,} {words.get(known, f'by its {known}')}" for known, count in sorted(counts.items(), reverse=True)
    )
