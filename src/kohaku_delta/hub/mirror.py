"""Invariant: a file counts as there only after all its bytes were hashed in this run and agree with its pin, wherever
it came from.

`file://` inputs stay where they are; `hf://` inputs are kept in the mirror as kind/owner/name/revision/file. A file
that is not there (or damaged) is first looked for in other mirrors, which may be read-only: what agrees is linked. Only
then is the network asked.

Hashes are not remembered from run to run of the download stage. Size, times and inode would say that nobody wrote to a
file; that its disk still gives back what was written they cannot say, and a training reads these files for weeks.
Hashing goes at the disk's speed, on all processors.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, concurrency, file_download, pins, verified_files
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.parallel import ordered_map
from kohaku_delta.params import Download, Pin


@dataclass(frozen=True)
class InputFile:
    """One file of the recipe."""

    name: str  # of its input
    several: bool  # whether that input is a list
    pin: Pin
    path: Path  # where it lies, or will

    @property
    def remote(self) -> bool:
        return self.pin.url.startswith("hf://")


def verify_file(path: Path, pin: Pin, advance: Callable[[int], object] = lambda count: None) -> VerifiedFile:
    """The file's sha256 and stamp. Refuses a file that is missing or that has another size or hash than its pin."""
    if not path.is_file():
        raise UserError(
            f"{path} is not there; it is pinned as {pin.url}. Put the file there, or mend the url in params.yaml (download.inputs)."
        )
    size = path.stat().st_size
    if pin.bytes is not None and size != pin.bytes:
        raise UserError(
            f"{path} has {size} bytes; its pin {pin.url} says {pin.bytes}. It is damaged or another file: {_remedy(pin)}"
        )
    found = verified_files.hash_with_stamp(path, advance)
    if pin.sha256 is not None and not found.sha256.startswith(pin.sha256):
        raise UserError(
            f"{path} has the sha256 {found.sha256}; its pin {pin.url} says {pin.sha256}. It is damaged or another file: {_remedy(pin)}"
        )
    return found


def _remedy(pin: Pin) -> str:
    if pin.url.startswith("hf://"):
        return "fetch it again."
    return "put the pinned file back, or change bytes and sha256 of its pin in params.yaml (download.inputs) if you mean to use this one."


def resolve_inputs(
    parameters: Download, folder: Path, skip: set[str] = frozenset(), others: Sequence[Path] = ()
) -> dict:
    """Verifies every pinned input but those named in `skip`, and fetches what is not there; returns the entries of
    inputs.json, each with its "stamp".

    folder: that of params.yaml; relative file:// urls and a relative mirror are seen from there. others: mirrors that
    are only read.
    """
    files = list_input_files(parameters, folder, skip)
    digests = verify_local(files, others)
    missing = [file for file in files if file not in digests]
    if missing:
        digests |= fetch_missing(missing, folder / parameters.mirror)
    entries: dict = {}
    for file in files:
        written = parameters.mirror if file.remote else file.pin.url.removeprefix("file://")
        entry = {
            "path": manifest_path(file.path, folder, written),
            "bytes": digests[file].stamp.bytes,
            "sha256": digests[file].sha256,
            "url": file.pin.url,
            "pinned": pins.pin_strength(file.pin),
            "stamp": digests[file].stamp,
        }
        if file.several:
            entries.setdefault(file.name, []).append(entry)
        else:
            entries[file.name] = entry
    return entries


def manifest_path(path: Path, folder: Path, written: str) -> str:
    """A place as inputs.json keeps it: relative to `folder`, that of params.yaml, unless it was `written` there as an
    absolute path.
    """
    return str(path) if os.path.isabs(written) else os.path.relpath(path, folder)


def list_input_files(parameters: Download, folder: Path, skip: set[str]) -> list[InputFile]:
    """Every file of the recipe, inputs by name and files in the order of their pins."""
    files = []
    for name, pinned in sorted(parameters.inputs.items()):
        if name in skip:
            continue
        for each in pinned if isinstance(pinned, list) else [pinned]:
            for pin in pins.expand_span(each, pins.pin_list_path(folder, name)):
                if pin.url.startswith("file://"):
                    path = folder / pin.url.removeprefix("file://")
                else:
                    path = folder / parameters.mirror / pins.hub_file(pin).path
                files.append(InputFile(name, isinstance(pinned, list), pin, path))
    if not files:
        raise UserError(
            "params.yaml pins no input (download.inputs is empty). For the miniature run `make miniature-data`."
        )
    for file in files:
        if file.remote and pins.hub_file(file.pin).revision is None:
            raise UserError(
                f"{file.pin.url} names no revision, and what lies there may change. Run `kohaku-delta pin`, which fills in the present one and shows it first."
            )
    return files


def verify_local(files: list[InputFile], others: Sequence[Path] = ()) -> dict[InputFile, VerifiedFile]:
    """The sha256 and stamp of each file that is there and right. What lies in another mirror is linked. Refuses a
    file:// input that is missing or wrong.
    """
    places = {
        file: [file.path, *(other / pins.hub_file(file.pin).path for other in others if file.remote)] for file in files
    }
    here = [file for file in files if not file.remote or any(path.is_file() for path in places[file])]
    sizes = [path.stat().st_size for file in here for path in [path for path in places[file] if path.is_file()][:1]]
    with concurrency.progress_bar("verify", sum(sizes)) as advance:

        def look(file: InputFile) -> VerifiedFile | None:
            if not file.remote:
                return verify_file(file.path, file.pin, advance)
            for path in places[file]:
                if path.is_file():
                    try:
                        found = verify_file(path, file.pin, advance)
                    except (UserError, OSError) as error:
                        reason = (
                            error.message.rsplit(": fetch", 1)[0]
                            if isinstance(error, UserError)
                            else f"{path} cannot be read ({error.strerror})"
                        )
                        concurrency.log_above_bar(f"{reason}: passed over")
                        continue
                    if path != file.path:
                        file_download.link(file.path, path)
                    return found
            return None

        return {file: found for file, found in zip(here, ordered_map(look, here), strict=True) if found is not None}


def fetch_missing(missing: list[InputFile], mirror: Path) -> dict[InputFile, VerifiedFile]:
    """Fetches files from the hub; returns their sha256 and stamps. The hub is asked about all of them, and the disk
    about its space, before the first byte.

    What cannot be fetched does not hold up the rest: it is told at the end, as one Refusal.
    """
    said = concurrency.map_concurrently(
        lambda file, stop: client.retry(lambda: client.head_file(pins.hub_file(file.pin)), file.pin.url, stop), missing
    )
    for file in missing:
        file_download.check_pin_matches(file.pin, said[file])
    parts = {file: file_download.partial_path(file.path, said[file]) for file in missing}
    there = sum(min(part.stat().st_size, said[file].size) for file, part in parts.items() if part.is_file())
    total = sum(each.size for each in said.values())
    concurrency.require_free_space(mirror, total - there)
    with concurrency.progress_bar("download", total, there) as advance:
        return concurrency.map_concurrently(
            lambda file, stop: file_download.download_file(file.pin, file.path, said[file], stop, advance), missing
        )
