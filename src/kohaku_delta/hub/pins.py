"""Pins: where an input comes from, its size, and its sha256 (whole, its first digits, or unknown).

A pin whose url has a span, data-{0000..2000}.tar, names many files. Its bytes and sha256 are then those of its list,
pins-<input>.csv beside params.yaml, which has one line per file (file,bytes,sha256): one hash in params.yaml pins them
all. Without sha256 there is no list, every file of the span is meant, and their hashes are recorded at the first
download. `kohaku-delta pin` writes list and hash.
"""

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.regular_files import read_regular

HF = re.compile(r"^hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?/(?P<file>.+)$")
SPAN = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SPAN, MAX_LIST = 100_000, 16 << 20  # files of a span; bytes of its list
COLUMNS = ["file", "bytes", "sha256"]


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face Hub."""

    repo: str
    kind: str  # "model" | "dataset"
    revision: str | None
    file: str

    @property
    def path(self) -> Path:
        """Its path in a mirror."""
        return Path(self.kind, self.repo, self.revision or "", self.file)


def hub_file(pin: Pin) -> HubFile:
    """The file of an hf:// pin. A revision must be a whole commit id: a branch moves."""
    match = HF.match(pin.url)
    if not match:
        raise UserError(f"{pin.url} is not of the form hf://[datasets/]owner/name@revision/file.")
    revision = match["revision"]
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"{pin.url}: the revision {revision!r} is not a commit id of 40 hex digits; a branch or tag can move."
        )
    if {"", ".", ".."} & {*match["repo"].split("/"), *match["file"].split("/")}:
        raise UserError(f"{pin.url} leads out of its repository. Correct the url in params.yaml (download.inputs).")
    return HubFile(match["repo"], "dataset" if match["kind"] else "model", revision, match["file"])


def pin_strength(pin: Pin) -> str:
    """How its bytes are known: "sha256", "prefix <digits>", or "recorded" at the first download."""
    if pin.sha256 is None:
        return "recorded"
    return "sha256" if len(pin.sha256) == 64 else f"prefix {pin.sha256}"


def unread_inputs(recipe: Recipe) -> set[str]:
    """The inputs that no stage reads with the recipe's merge.start and download.images: they need not exist."""
    unread = {"delta_base"} if recipe.merge.start == "merge" else {"beta", "gamma", "sdxl"}
    return unread | ({"index"} if recipe.download.images == "all" else set())


def span_files(pin: Pin) -> int:
    """How many files its url names."""
    match = SPAN.search(pin.url)
    return int(match[2]) - int(match[1]) + 1 if match else 1


def span_urls(pin: Pin) -> list[str]:
    """The url of each file that its url names."""
    match = SPAN.search(pin.url)
    if not match:
        return [pin.url]
    if span_files(pin) > MAX_SPAN:
        raise UserError(f"{pin.url} names {span_files(pin):,} files; at most {MAX_SPAN:,} are meant by one pin.")
    before, after = pin.url[: match.start()], pin.url[match.end() :]
    return [f"{before}{number:0{len(match[1])}}{after}" for number in range(int(match[1]), int(match[2]) + 1)]


def expand_span(pin: Pin, pin_list: Path) -> list[Pin]:
    """One pin per file of a pin with a span, as its list `pin_list` has them; any other pin as it is."""
    match = SPAN.search(pin.url)
    if not match:
        return [pin]
    urls = span_urls(pin)
    if pin.sha256 is None:
        return [Pin(url=url, bytes=None, sha256=None) for url in urls]
    folder = pin.url[: pin.url.rindex("/", 0, match.start()) + 1]
    listed = {folder + file: entry for file, entry in read_pin_list(pin_list, pin).items()}
    if unknown := sorted(listed.keys() - set(urls)):
        raise UserError(
            f"{pin_list} names {unknown[0].removeprefix(folder)}, which is not a file of {pin.url}. "
            "Run `kohaku-delta pin` again, or correct the url."
        )
    return [Pin(url=url, bytes=listed[url][0], sha256=listed[url][1]) for url in urls if url in listed]


def expand_input(name: str, pinned: Pin | list[Pin], folder: Path) -> list[Pin]:
    """One pin per file of an input. folder: that of params.yaml and of the lists of pins."""
    spans = pinned if isinstance(pinned, list) else [pinned]
    return [
        pin for place, span in enumerate(spans) for pin in expand_span(span, paths.pin_list_path(folder, name, place))
    ]


def format_pin_list(files: list[tuple[str, int, str | None]]) -> bytes:
    """The content of a list of (file, bytes, sha256)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *files])
    return text.getvalue().encode()


def read_pin_list(pin_list: Path, pin: Pin) -> dict[str, tuple[int, str | None]]:
    """file → (bytes, sha256) of a list whose own sha256 is the pin's."""
    try:
        content = read_regular(pin_list, MAX_LIST)
    except FileNotFoundError:
        raise UserError(
            f"{pin_list} does not exist; {pin.url} is pinned by it. "
            "Restore it, or set that pin's bytes and sha256 to null and run `kohaku-delta pin`."
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != pin.sha256:
        raise UserError(
            f"{pin_list} has the sha256 {found}; params.yaml pins {pin.sha256} ({pin.url}). "
            "Restore the list that was pinned."
        )
    try:
        header, *rows = list(csv.reader(io.StringIO(content.decode("utf-8", "replace")))) or [[]]
    except csv.Error:
        header, rows = [], []
    row_form = re.compile(r"[^,]*,[1-9][0-9]{0,17},([0-9a-f]{64})?")
    if header != COLUMNS or any(len(row) != 3 or not row_form.fullmatch(",".join(row)) for row in rows):
        raise UserError(
            f"{pin_list} is not a list of pins ({','.join(COLUMNS)}). Run `kohaku-delta pin`, which writes it."
        )
    return {file: (int(size), sha256 or None) for file, size, sha256 in rows}
