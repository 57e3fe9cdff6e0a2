"""Invariant: what a pin says is never changed; what it leaves open is filled from the hub's list at one revision, and
every other byte of params.yaml stays.

A file that the user supplies (file://) is left as it is: its hash would be that user's, and would look as if the
release had given it.
"""

import difflib
import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, pins
from kohaku_delta.hub.client import RemoteFile
from kohaku_delta.hub.pins import HubFile
from kohaku_delta.params import Pin, Recipe


@dataclass
class PinEdit:
    """New contents by path, and what is to be said about them."""

    files: dict[Path, bytes] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def fill_pins(params: Path, recipe: Recipe) -> PinEdit:
    """What `params`, the file of `recipe`, becomes when the hub is asked for what its pins leave open. Writes nothing."""
    change, filled = PinEdit(), {}
    for name, pinned in sorted(recipe.download.inputs.items()):
        for number, pin in enumerate(pinned if isinstance(pinned, list) else [pinned]):
            open_hf = pin.url.startswith("hf://") and (
                pins.hub_file(pin).revision is None or pin.bytes is None or pin.sha256 is None
            )
            if open_hf:
                filled[(name, number) if isinstance(pinned, list) else (name,)] = _filled_pin(
                    name, pin, params.parent, change
                )
            elif pins.pin_strength(pin) != "sha256":
                change.said.append(
                    f"{name}: {pin.url} is supplied by whoever runs the recipe; inputs.json will say “{pins.pin_strength(pin)}” of it"
                )
    old = params.read_bytes().decode()
    new = _edited_yaml(old, filled, params)
    if new != old:
        change.files[params] = new.encode()
    return change


def unified_diff(path: Path, content: bytes) -> list[str]:
    """The lines of a unified diff from what lies at `path` to `content`."""
    old = path.read_text() if path.is_file() else ""
    return list(
        difflib.unified_diff(
            old.splitlines(), content.decode().splitlines(), str(path), f"{path} as it would be", lineterm="", n=2
        )
    )


def _filled_pin(name: str, pin: Pin, folder: Path, change: PinEdit) -> Pin:
    place = pins.hub_file(pin)
    if place.revision is None:
        commit = client.retry(lambda: client.latest_commit(place), pin.url, threading.Event())
        pin = Pin(url=pin.url.replace(place.repo, f"{place.repo}@{commit}", 1), bytes=pin.bytes, sha256=pin.sha256)
        change.said.append(
            f"{name}: nobody knows which revision the release used; {commit} is the present one of {place.repo}"
        )
    if not pins.has_span(pin):
        said = _pin_list([pin]).get(pins.hub_file(pin).file)
        if said is None or not said.size:
            raise UserError(
                f"{pin.url} is not in the hub's list of files, or empty. Mend the url in params.yaml (download.inputs.{name})."
            )
        if (pin.bytes or said.size) != said.size or (said.sha256 and not said.sha256.startswith(pin.sha256 or "")):
            raise UserError(
                f"{pin.url}: the hub lists {said.size} bytes, sha256 {said.sha256}; the pin says {pin.bytes} and {pin.sha256}. It is another file."
            )
        if pin.sha256 is None and said.sha256 is None:
            change.said.append(f"{name}: the hub lists no sha256 of {place.file}; it stays recorded at first download")
        return Pin(url=pin.url, bytes=said.size, sha256=pin.sha256 or said.sha256)
    if pin.sha256 is not None:
        raise UserError(
            f"{pin.url} has a list and lacks bytes or revision. Set its bytes and sha256 to null, then run this again."
        )
    wanted = pins.expand_span(pin, pins.pin_list_path(folder, name))
    said = _pin_list(wanted)
    rows = [
        (place.file.rpartition("/")[2], said[place.file].size, said[place.file].sha256)
        for place in map(pins.hub_file, wanted)
        if place.file in said
    ]
    if not rows or not all(size for _, size, _ in rows):
        raise UserError(
            f"The hub lists {'an empty' if rows else 'no'} file of {pin.url}. Mend the url in params.yaml (download.inputs.{name})."
        )
    content = pins.format_pin_list(rows)
    change.files[pins.pin_list_path(folder, name)] = content
    absent, unknown = len(wanted) - len(rows), sum(sha256 is None for *_, sha256 in rows)
    change.said += (
        [f"{name}: {absent:,} of {len(wanted):,} files are not there, and will not be asked for"] if absent else []
    )
    change.said += (
        [f"{name}: the hub lists no sha256 of {unknown:,} files; they stay recorded at first download"]
        if unknown
        else []
    )
    return Pin(url=pin.url, bytes=sum(size for _, size, _ in rows), sha256=hashlib.sha256(content).hexdigest())


def _pin_list(wanted: list[Pin]) -> dict[str, RemoteFile]:
    places: list[HubFile] = [pins.hub_file(pin) for pin in wanted]
    return client.retry(lambda: client.list_files(places), wanted[0].url, threading.Event())


def _edited_yaml(text: str, filled: dict[tuple, Pin], params: Path) -> str:
    """The file with the filled pins: nulls and urls are replaced where they stand."""
    document, meant = YAML().load(text), YAML(typ="safe", pure=True).load(text)
    lines, edits = text.splitlines(keepends=True), []
    for path, pin in filled.items():
        node, plain = document["download"]["inputs"], meant["download"]["inputs"]
        for key in path:
            node, plain = node[key], plain[key]
        for key, value in pin.model_dump().items():
            if plain[key] != value:
                line, column = node.lc.value(key)
                old, new = (
                    (plain[key], value) if key == "url" else ("null", f'"{value}"' if key == "sha256" else str(value))
                )
                edits.append((line, lines[line].find(old, column), old, new))
                plain[key] = value
    for line, column, old, new in sorted(edits, reverse=True):
        lines[line] = lines[line][:column] + new + lines[line][column + len(old) :]
    new = "".join(lines)
    if any(column < 0 for _, column, *_ in edits) or YAML(typ="safe", pure=True).load(new) != meant:
        raise UserError(
            f"{params} is written in a way that cannot be filled in place. Write what is not known as null, each key on its line."
        )
    return new
