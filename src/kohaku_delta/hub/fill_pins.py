"""Fills in what pins leave open (revision, bytes, sha256) from the Hub. What a pin says is never changed, and every
other byte of params.yaml stays.

A file that the user supplies (file://) is left as it is: its hash would be that user's, and would look as if the
release had given it.
"""

import difflib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ruamel.yaml import YAML

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, connection, pins
from kohaku_delta.hub.client import RemoteFile
from kohaku_delta.hub.hub_errors import Unreachable
from kohaku_delta.params import Pin, Recipe

Result = TypeVar("Result")


@dataclass
class PinEdit:
    """New contents by path, and remarks about them."""

    files: dict[Path, bytes] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def fill_pins(params: Path, recipe: Recipe) -> PinEdit:
    """The edit of `params`, the file of `recipe`, that fills in its pins from the Hub. Writes nothing."""
    edit, filled = PinEdit(), {}
    for name, pinned in sorted(recipe.download.inputs.items()):
        for number, pin in enumerate(recipe.download.pins(name)):
            if not pin.local_path and (pins.hub_file(pin).revision is None or pin.bytes is None or pin.sha256 is None):
                key = (name, number) if isinstance(pinned, list) else (name,)
                filled[key] = _filled_pin(name, pin, paths.pin_list_path(params.parent, name, number), edit)
            elif pins.pin_strength(pin) != "sha256":
                edit.remarks.append(
                    f"{name}: {pin.url} is supplied by whoever runs the recipe; "
                    f"inputs.json will call it “{pins.pin_strength(pin)}”"
                )
    old = params.read_bytes().decode()
    new = _edited_yaml(old, filled, params)
    if new != old:
        edit.files[params] = new.encode()
    return edit


def unified_diff(path: Path, content: bytes) -> list[str]:
    """The lines of a unified diff from the file at `path` to `content`."""
    old = path.read_text().splitlines() if path.is_file() else []
    new = content.decode().splitlines()
    return list(difflib.unified_diff(old, new, str(path), f"{path} (new)", lineterm="", n=2))


def _filled_pin(name: str, pin: Pin, pin_list: Path, edit: PinEdit) -> Pin:
    file = pins.hub_file(pin)
    if file.revision is None:
        commit = _ask(lambda: client.latest_commit(file), pin)
        pin = pin.model_copy(update={"url": pin.url.replace(file.repo, f"{file.repo}@{commit}", 1)})
        edit.remarks.append(
            f"{name}: the revision that the release used is not known; {commit} is the latest of {file.repo}"
        )
    return _filled_span(name, pin, pin_list, edit) if pins.SPAN.search(pin.url) else _filled_file(name, pin, edit)


def _filled_file(name: str, pin: Pin, edit: PinEdit) -> Pin:
    file = pins.hub_file(pin)
    remote = _list_files([pin]).get(file.file)
    if remote is None or not remote.size:
        raise UserError(
            f"{pin.url} is not in the hub's list of files, or empty. "
            f"Correct the url in params.yaml (download.inputs.{name})."
        )
    if (pin.bytes or remote.size) != remote.size or (remote.sha256 and not remote.sha256.startswith(pin.sha256 or "")):
        raise UserError(
            f"{pin.url}: the hub lists {remote.size} bytes, sha256 {remote.sha256}; "
            f"the pin says {pin.bytes} and {pin.sha256}. It is another file."
        )
    if pin.sha256 is None and remote.sha256 is None:
        edit.remarks.append(f"{name}: the hub lists no sha256 of {file.file}; it is recorded at the first download")
    return Pin(url=pin.url, bytes=remote.size, sha256=pin.sha256 or remote.sha256)


def _filled_span(name: str, pin: Pin, pin_list: Path, edit: PinEdit) -> Pin:
    if pin.sha256 is not None:
        raise UserError(
            f"{pin.url} has a list and lacks bytes or revision. Set its bytes and sha256 to null, then run this again."
        )
    wanted = pins.expand_span(pin, pin_list)
    remote = _list_files(wanted)
    found = [file for file in (pins.hub_file(each).file for each in wanted) if file in remote]
    rows = [(file.rpartition("/")[2], remote[file].size, remote[file].sha256) for file in found]
    if not rows or not all(size for _, size, _ in rows):
        raise UserError(
            f"The hub lists {'an empty' if rows else 'no'} file of {pin.url}. "
            f"Correct the url in params.yaml (download.inputs.{name})."
        )
    content = pins.format_pin_list(rows)
    edit.files[pin_list] = content
    if absent := len(wanted) - len(rows):
        edit.remarks.append(f"{name}: {absent:,} of {len(wanted):,} files do not exist, and are left out")
    if unknown := sum(sha256 is None for *_, sha256 in rows):
        edit.remarks.append(
            f"{name}: the hub lists no sha256 of {unknown:,} files; they are recorded at the first download"
        )
    return Pin(url=pin.url, bytes=sum(size for _, size, _ in rows), sha256=hashlib.sha256(content).hexdigest())


def _list_files(wanted: list[Pin]) -> dict[str, RemoteFile]:
    files = [pins.hub_file(pin) for pin in wanted]
    return _ask(lambda: client.list_files(files), wanted[0])


def _ask(question: Callable[[], Result], pin: Pin) -> Result:
    """The Hub's answer. Without a network this fails at once: somebody waits for it, and nothing is lost."""

    def once() -> Result:
        try:
            return question()
        except Unreachable as error:
            raise UserError(
                f"{pin.url}: the hub {error}. `kohaku-delta pin` needs the network: run it where there is one, or fill "
                "in the pin by hand."
            ) from None

    connection.require_online("`kohaku-delta pin` asks the hub")
    return client.retry(once, pin.url, threading.Event())


def _edited_yaml(text: str, filled: dict[tuple, Pin], params: Path) -> str:
    """The text with the filled pins: nulls and urls are replaced in place."""
    document, expected = YAML().load(text), YAML(typ="safe", pure=True).load(text)
    lines, edits = text.splitlines(keepends=True), []
    for path, pin in filled.items():
        node, plain = document["download"]["inputs"], expected["download"]["inputs"]
        for key in path:
            node, plain = node[key], plain[key]
        for key, value in pin.model_dump().items():
            if plain[key] != value:
                line, column = node.lc.value(key)
                old = plain[key] if key == "url" else "null"
                new = f'"{value}"' if key == "sha256" else str(value)
                edits.append((line, lines[line].find(old, column), old, new))
                plain[key] = value
    for line, column, old, new in sorted(edits, reverse=True):
        lines[line] = lines[line][:column] + new + lines[line][column + len(old) :]
    new_text = "".join(lines)
    if any(column < 0 for _, column, *_ in edits) or YAML(typ="safe", pure=True).load(new_text) != expected:
        raise UserError(
            f"{params} cannot be filled in in place as it is written. "
            "Write unknown values as null, each key on its own line."
        )
    return new_text
