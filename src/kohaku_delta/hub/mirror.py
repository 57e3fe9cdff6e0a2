"""Invariant: a file counts as there only after all its bytes were hashed and agree with its pin.

`file://` inputs stay where they are; `hf://` inputs are kept in the mirror as owner/name/revision/file. A file whose pin has no sha256 is
"recorded at first download": inputs.json says what was found.
"""

import hashlib
from pathlib import Path

from tqdm import tqdm

from kohaku_delta.hub import pins
from kohaku_delta.params import Download, Pin
from kohaku_delta.refusal import Refusal

PIECE = 1 << 20


def hashed(path: Path, bar: tqdm | None = None) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            if bar is not None:
                bar.update(len(piece))
    return digest.hexdigest()


def verify(path: Path, pin: Pin, bar: tqdm | None = None) -> str:
    """The file's sha256. Refuses a file that is missing or that has another size or hash than its pin."""
    if not path.is_file():
        raise Refusal(f"{path} is not there; it is pinned as {pin.url}. Put the file there, or mend the url in params.yaml (download.inputs).")
    size = path.stat().st_size
    if pin.bytes is not None and size != pin.bytes:
        raise Refusal(f"{path} has {size} bytes; its pin {pin.url} says {pin.bytes}. It is damaged or another file: fetch it again.")
    found = hashed(path, bar)
    if pin.sha256 is not None and not found.startswith(pin.sha256):
        raise Refusal(f"{path} has the sha256 {found}; its pin {pin.url} says {pin.sha256}. It is damaged or another file: fetch it again.")
    return found


def fetch(pin: Pin, mirror: Path) -> Path:
    """The file of an hf:// pin in the mirror, downloaded by huggingface_hub if it is not there yet."""
    place = pins.place(pin)
    folder = mirror / place.kind / place.repo / (place.revision or "unpinned")
    target = folder / place.file
    if not target.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            hf_hub_download(place.repo, place.file, repo_type=place.kind, revision=place.revision, local_dir=folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Refusal(f"{pin.url} could not be fetched: {reason} Check the network and, for a gated repository, HF_TOKEN; what arrived is kept.") from None
    return target


def gather(parameters: Download, folder: Path, skip: set[str] = frozenset()) -> dict:
    """Fetches and verifies every pinned input but those named in `skip`; returns the entries of inputs.json.

    folder: that of params.yaml; relative file:// urls and a relative mirror are seen from there.
    """
    wanted = [
        (name, isinstance(pinned, list), pin)
        for name, pinned in sorted(parameters.inputs.items())
        if name not in skip
        for each in (pinned if isinstance(pinned, list) else [pinned])
        for pin in pins.spread(each)
    ]
    if not wanted:
        raise Refusal("params.yaml pins no input (download.inputs is empty). For the miniature run `make miniature-data`.")
    entries: dict = {}
    with tqdm(desc="verify", unit="B", unit_scale=True, total=sum(pin.bytes or 0 for *_, pin in wanted), disable=None) as bar:
        for name, several, pin in wanted:
            path = folder / pin.url.removeprefix("file://") if pin.url.startswith("file://") else fetch(pin, folder / parameters.mirror)
            found = verify(path, pin, bar)
            entry = {"path": str(path), "bytes": path.stat().st_size, "sha256": found, "url": pin.url}
            if several:
                entries.setdefault(name, []).append(entry)
            else:
                entries[name] = entry
    return entries
