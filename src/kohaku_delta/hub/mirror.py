"""Finds, verifies and downloads the inputs of a recipe. A file is used only after all its bytes were hashed in this run
and agree with its pin, wherever it came from.

`file://` inputs stay in place; `hf://` inputs are kept in the mirror as kind/owner/name/revision/file. A file that is
missing there (or damaged) is first looked for in other mirrors, which may be read-only, and linked if it agrees. Such a
mirror may also be huggingface_hub's cache, or a folder of files; in a folder only what is pinned by a sha256 counts.
Only then is it downloaded.

The download stage remembers no hashes from run to run. Size, times and inode would show that nobody wrote to a file;
they cannot show that its disk still returns what was written, and a training reads these files for weeks. Hashing runs
at the disk's speed, on all processors.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.hub import client, file_download, pins, progress, verified_files
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.parallel import map_all, ordered_map
from kohaku_delta.params import Download, Pin
from kohaku_delta.printing import log_above_bar


@dataclass(frozen=True)
class InputFile:
    """One file of the recipe."""

    name: str  # of its input
    several: bool  # whether that input is a list
    pin: Pin
    path: Path  # where it is, or will be

    @property
    def remote(self) -> bool:
        return self.pin.local_path is None


def verify_file(path: Path, pin: Pin, advance: Callable[[int], object] = lambda count: None) -> VerifiedFile:
    """The file's sha256 and stamp. Raises UserError if it is missing or has another size or hash than its pin."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; it is pinned as {pin.url}. "
            "Put the file there, or correct the url in params.yaml (download.inputs)."
        )
    size = path.stat().st_size
    if pin.bytes is not None and size != pin.bytes:
        raise UserError(f"{path} has {size} bytes; its pin {pin.url} says {pin.bytes}. {_remedy(pin)}")
    found = verified_files.hash_with_stamp(path, advance)
    if pin.sha256 is not None and not found.sha256.startswith(pin.sha256):
        raise UserError(f"{path} has the sha256 {found.sha256}; its pin {pin.url} says {pin.sha256}. {_remedy(pin)}")
    return found


def _remedy(pin: Pin) -> str:
    if pin.local_path is None:
        return "It is damaged or another file."  # and is downloaded again
    return (
        "It is damaged or another file: put the pinned file back, "
        "or change bytes and sha256 of its pin in params.yaml (download.inputs) if you mean to use this one."
    )


def resolve_inputs(
    parameters: Download,
    folder: Path,
    skip: frozenset[str] | set[str] = frozenset(),
    other_mirrors: Sequence[Path] = (),
) -> dict:
    """Verifies every pinned input except those named in `skip`, and downloads missing ones; returns the entries of
    inputs.json, each with its "stamp".

    folder: that of params.yaml; relative file:// urls and a relative mirror are relative to it. other_mirrors: only
    read.
    """
    files = list_input_files(parameters, folder, skip)
    verified = verify_local(files, other_mirrors)
    missing = [file for file in files if file not in verified]
    if missing:
        verified |= download_missing(missing, folder / parameters.mirror)
    entries: dict = {}
    for file in files:
        written = file.pin.local_path or parameters.mirror
        entry = {
            "path": manifest_path(file.path, folder, written),
            "bytes": verified[file].stamp.bytes,
            "sha256": verified[file].sha256,
            "url": file.pin.url,
            "pinned": pins.pin_strength(file.pin),
            "stamp": verified[file].stamp,
        }
        if file.several:
            entries.setdefault(file.name, []).append(entry)
        else:
            entries[file.name] = entry
    return entries


def manifest_path(path: Path, folder: Path, written: str) -> str:
    """A path as inputs.json keeps it: relative to `folder` (that of params.yaml), unless it was `written` there as an
    absolute path.
    """
    return str(path) if os.path.isabs(written) else os.path.relpath(path, folder)


def list_input_files(parameters: Download, folder: Path, skip: frozenset[str] | set[str]) -> list[InputFile]:
    """Every file of the recipe, inputs by name and files in the order of their pins."""
    files = []
    for name, pinned in sorted(parameters.inputs.items()):
        if name in skip:
            continue
        for pin in pins.expand_input(name, pinned, folder):
            if pin.local_path:
                path = folder / pin.local_path
            elif pins.hub_file(pin).revision is not None:
                path = folder / parameters.mirror / pins.hub_file(pin).path
            else:
                raise UserError(
                    f"{pin.url} names no revision, and the file there may change. "
                    "Run `kohaku-delta pin`, which fills in the latest one and shows it before writing."
                )
            files.append(InputFile(name, isinstance(pinned, list), pin, path))
    if not files:
        raise UserError(
            "params.yaml pins no input (download.inputs is empty). For the miniature run `make miniature-data`."
        )
    return files


def verify_local(files: list[InputFile], other_mirrors: Sequence[Path] = ()) -> dict[InputFile, VerifiedFile]:
    """The sha256 and stamp of each file that exists and agrees with its pin; files of other mirrors are linked. Raises
    UserError for a file:// input that is missing or wrong.
    """
    candidates: dict[InputFile, list[Path]] = {}
    used: set[Path] = set()
    for file in files:
        if not file.remote:
            candidates[file] = [file.path]
            continue
        copies = {
            other: [path for path in candidate_paths(other, file.pin) if path.is_file()] for other in other_mirrors
        }
        used |= {other for other in other_mirrors if copies[other]}
        if existing := [file.path] * file.path.is_file() + [path for paths in copies.values() for path in paths]:
            candidates[file] = existing
    for other in other_mirrors:
        _report_mirror(other, is_used=other in used or not any(file.remote for file in files))
    total = sum(paths[0].stat().st_size for paths in candidates.values() if paths[0].is_file())
    with progress.progress_bar("verify", total) as advance:

        def verify(file: InputFile) -> VerifiedFile | None:
            if not file.remote:
                return verify_file(file.path, file.pin, advance)
            for path in candidates[file]:
                try:
                    found = verify_file(path, file.pin, advance)
                except UserError as error:
                    log_above_bar(f"{error.message} It is not used.")
                except OSError as error:
                    log_above_bar(f"{path} cannot be read ({error.strerror}). It is not used.")
                else:
                    if path != file.path:
                        file_download.link(file.path, path)
                    return found
            return None

        results = zip(candidates, ordered_map(verify, candidates), strict=True)
        return {file: found for file, found in results if found is not None}


def candidate_paths(mirror: Path, pin: Pin) -> list[Path]:
    """Where another mirror may have the file of an hf:// pin."""
    file = pins.hub_file(pin)
    cached = Path(f"{file.kind}s--{file.repo.replace('/', '--')}", "snapshots", file.revision or "", file.file)
    known = [mirror / file.path, mirror / cached, mirror / "hub" / cached]
    # these names do not tell repository and revision, so only the hash can decide
    return known + (list(dict.fromkeys([mirror / file.file, mirror / Path(file.file).name])) if pin.sha256 else [])


def _report_mirror(mirror: Path, is_used: bool) -> None:
    """Raises UserError if another mirror is no folder; says so if it has none of the files."""
    if not mirror.is_dir():
        raise UserError(f"--mirror {mirror} is not a folder that exists.")
    if not is_used:
        log_above_bar(
            f"--mirror {mirror} has none of the inputs, neither as a mirror (kind/owner/name/revision/file), nor as a "
            "Hugging Face cache (models--owner--name/snapshots/…), nor, for inputs with a sha256, as a folder of files."
        )


def download_missing(missing: list[InputFile], mirror: Path) -> dict[InputFile, VerifiedFile]:
    """Downloads files from the Hub; returns their sha256 and stamps. The Hub is asked about all of them, and the disk's
    free space is checked, before the first byte.

    A file that fails does not hold up the rest: all failures are raised at the end as one UserError.
    """
    remote = map_all(
        lambda file, stop: client.retry(lambda: client.head_file(pins.hub_file(file.pin)), file.pin.url, stop), missing
    )
    for file in missing:
        file_download.check_pin_matches(file.pin, remote[file])
    parts = {file: file_download.partial_path(file.path, remote[file]) for file in missing}
    arrived = sum(min(part.stat().st_size, remote[file].size) for file, part in parts.items() if part.is_file())
    total = sum(each.size for each in remote.values())
    file_download.require_free_space(mirror, total - arrived)
    with progress.progress_bar("download", total, arrived) as advance:
        return map_all(
            lambda file, stop: file_download.download_file(file.pin, file.path, remote[file], stop, advance), missing
        )
