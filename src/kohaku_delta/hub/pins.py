"""Invariant: a pin says one file: where it comes from, its size and its sha256 (whole, its first digits, or not known)."""

import re
from dataclasses import dataclass

from kohaku_delta.params import Pin
from kohaku_delta.refusal import Refusal

HF = re.compile(r"^hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?/(?P<file>.+)$")
SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Place:
    """A file on the hub."""

    repo: str
    kind: str  # "model" | "dataset"
    revision: str | None
    file: str


def place(pin: Pin) -> Place:
    """The hub's place of an hf:// pin. A revision must be a whole commit id: a branch moves."""
    match = HF.match(pin.url)
    if not match:
        raise Refusal(f"{pin.url} is not of the form hf://[datasets/]owner/name@revision/file.")
    revision = match["revision"]
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise Refusal(f"{pin.url}: the revision {revision!r} is not a commit id of 40 hex digits; a branch or tag can move.")
    return Place(match["repo"], "dataset" if match["kind"] else "model", revision, match["file"])


def spread(pin: Pin) -> list[Pin]:
    """A pin whose url holds {0000..2000} as one pin a file; any other pin as it is."""
    match = SPAN.search(pin.url)
    if not match:
        return [pin]
    first, last = match[1], match[2]
    return [
        pin.model_copy(update={"url": pin.url[: match.start()] + str(number).zfill(len(first)) + pin.url[match.end() :]})
        for number in range(int(first), int(last) + 1)
    ]
