"""Invariant: inputs.json names every verified input once: its place, bytes and sha256. Readers check the size before they believe the place.

It is the same on every host: a place is written as seen from the folder of inputs.json, and hf:// inputs always lie in the recipe's own mirror
(what another mirror has is linked there). Only an absolute path in params.yaml itself stays absolute. `pinned` says how each
file was known: "sha256", "prefix <digits>", or "recorded" when nothing but this run says what it is; `start` says where the base comes from.
"""

import json
import os
from collections import Counter
from pathlib import Path

from kohaku_delta import atomic
from kohaku_delta.refusal import Refusal


def write(entries: dict, folder: Path, start: str, path) -> None:
    """entries: input name → {path, bytes, sha256, url, pinned} or a list of them; relative paths as seen from `folder`. start: merge.start of the recipe."""
    path = Path(path)

    def seen(entry: dict) -> dict:
        place = entry["path"] if os.path.isabs(entry["path"]) else os.path.relpath(folder / entry["path"], path.parent)
        return entry | {"path": place}

    entries = {name: [seen(each) for each in entry] if isinstance(entry, list) else seen(entry) for name, entry in entries.items()}
    with atomic.writing(path, "w") as file:
        json.dump({"inputs": entries, "start": start}, file, indent=1, sort_keys=True)
        file.write("\n")


def _checked(file: Path, entry: dict) -> Path:
    place = Path(os.path.normpath(file.parent / entry["path"]))
    if not place.is_file():
        raise Refusal(f"{place} is named by {file} and is not there. Run the download stage again (`dvc repro -f -s download`).")
    if place.stat().st_size != entry["bytes"]:
        size = f"{place} has {place.stat().st_size} bytes; {file} says {entry['bytes']}"
        raise Refusal(f"{size}. Run the download stage again (`dvc repro -f -s download`): it fetches what is damaged.")
    return place


def _entry(file, name: str):
    file = Path(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))["inputs"][name]
    except FileNotFoundError:
        raise Refusal(f"{file} is not there. Run the download stage, or name the input itself by its option.") from None
    except (ValueError, TypeError):
        raise Refusal(f"{file} is not a list of inputs. Run the download stage again.") from None
    except KeyError:
        raise Refusal(f"{file} names no input {name!r}. Add it to download.inputs in params.yaml, or name the file by its option.") from None


def path(file, name: str) -> Path:
    """Where the input `name` lies, its size checked."""
    return _checked(Path(file), _entry(file, name))


def paths(file, name: str) -> list[Path]:
    """The same for an input of several files (the tars), in the order of the pins."""
    return [_checked(Path(file), entry) for entry in _entry(file, name)]


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


def tally(files: list[dict]) -> str:
    """How many of these entries were known by what, as a phrase."""
    counts = Counter(each["pinned"] for each in files)
    words = {"sha256": "as pinned", "recorded": "pinned by nothing: recorded here", "members": "in part, each member by the public index"}
    return ", ".join(f"{count:,} {words.get(known, f'by its {known}')}" for known, count in sorted(counts.items(), reverse=True))
