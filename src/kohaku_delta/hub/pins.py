"""Invariant: a pin says one file: where it comes from, its size and its sha256 (whole, its first digits, or not known).

A pin whose url holds a span, data-{0000..2000}.tar, says many files. Its bytes and sha256 are then those of its list,
pins-<input>.csv beside params.yaml, which has a line a file (file,bytes,sha256): one digest in params.yaml pins them
all. Without sha256 there is no list, every file of the span is meant, and their hashes are recorded at first download.
`kohaku-delta pin` writes list and digest.
"""

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.params import Pin

HF = re.compile(r"^hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?/(?P<file>.+)$")
SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")
COLUMNS = ["file", "bytes", "sha256"]


@dataclass(frozen=True)
class HubFile:
    """A file on the hub."""

    repo: str
    kind: str  # "model" | "dataset"
    revision: str | None
    file: str

    @property
    def path(self) -> Path:
        """Where it lies in a mirror."""
        return Path(self.kind, self.repo, self.revision or "", self.file)


def hub_file(pin: Pin) -> HubFile:
    """The hub's place of an hf:// pin. A revision must be a whole commit id: a branch moves."""
    match = HF.match(pin.url)
    if not match:
        raise UserError(f"{pin.url} is not of the form hf://[datasets/]owner/name@revision/file.")
    revision = match["revision"]
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"{pin.url}: the revision {revision!r} is not a commit id of 40 hex digits; a branch or tag can move."
        )
    if {"", ".", ".."} & {*match["repo"].split("/"), *match["file"].split("/")}:
        raise UserError(f"{pin.url} leads out of its repository. Mend the url in params.yaml (download.inputs).")
    return HubFile(match["repo"], "dataset" if match["kind"] else "model", revision, match["file"])


def pin_strength(pin: Pin) -> str:
    """How its bytes are known: "sha256", "prefix <digits>", or "recorded" at first download."""
    if pin.sha256 is None:
        return "recorded"
    return "sha256" if len(pin.sha256) == 64 else f"prefix {pin.sha256}"


def has_span(pin: Pin) -> bool:
    return SPAN.search(pin.url) is not None


def span_files(pin: Pin) -> int:
    """How many files its url names."""
    match = SPAN.search(pin.url)
    return int(match[2]) - int(match[1]) + 1 if match else 1


def expand_span(pin: Pin, listing: Path) -> list[Pin]:
    """A pin whose url holds {0000..2000} as one pin a file, as its list `listing` has them; any other pin as it is."""
    match = SPAN.search(pin.url)
    if not match:
        return [pin]
    urls = {
        pin.url[: match.start()] + str(number).zfill(len(match[1])) + pin.url[match.end() :]: number
        for number in range(int(match[1]), int(match[2]) + 1)
    }
    if pin.sha256 is None:
        return [Pin(url=url, bytes=None, sha256=None) for url in urls]
    listed = read_pin_list(listing, pin)
    front = pin.url[: pin.url.rindex("/", 0, match.start()) + 1]
    if strange := sorted(file for file in listed if front + file not in urls):
        raise UserError(
            f"{listing} names {strange[0]}, which is no file of {pin.url}. Run `kohaku-delta pin` again, or mend the url."
        )
    return [
        Pin(url=url, bytes=listed[url[len(front) :]][0], sha256=listed[url[len(front) :]][1])
        for url in urls
        if url[len(front) :] in listed
    ]


def pin_list_path(folder: Path, name: str) -> Path:
    """The list of the input `name`, beside the params.yaml of `folder`."""
    return folder / f"pins-{name}.csv"


def format_pin_list(files: list[tuple[str, int, str | None]]) -> bytes:
    """The content of a list: (file, bytes, sha256) each."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [COLUMNS, *((file, size, sha256 or "") for file, size, sha256 in files)]
    )
    return text.getvalue().encode()


def read_pin_list(listing: Path, pin: Pin) -> dict[str, tuple[int, str | None]]:
    """file → (bytes, sha256) of a list whose own sha256 is the pin's."""
    try:
        content = listing.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{listing} is not there; {pin.url} is pinned by it. Bring it back, or set that pin's bytes and sha256 to null and run `kohaku-delta pin`."
        ) from None
    if hashlib.sha256(content).hexdigest() != pin.sha256:
        raise UserError(
            f"{listing} has the sha256 {hashlib.sha256(content).hexdigest()}; params.yaml pins {pin.sha256} ({pin.url}). Bring back the list that was pinned."
        )
    rows = list(csv.reader(io.StringIO(content.decode("utf-8", "replace"))))
    if rows[:1] != [COLUMNS] or any(
        len(row) != 3 or not re.fullmatch(r"[1-9][0-9]{0,17}", row[1]) or not re.fullmatch(r"([0-9a-f]{64})?", row[2])
        for row in rows[1:]
    ):
        raise UserError(
            f"{listing} is not a list of pins ({','.join(COLUMNS)}). Run `kohaku-delta pin`, which writes it."
        )
    return {file: (int(size), sha256 or None) for file, size, sha256 in rows[1:]}
