"""The inputs of a rehearsal: synthetic files of the real sizes and layouts, in the mirror where the recipe's urls say.

7.1 million posts, and tars in which every fourth has a picture of 64 × 64 pixels (benchmarks/synthetic_danbooru.py);
checkpoints of SDXL's names and shapes (benchmarks/synthetic_checkpoints.py); tokenizers with CLIP's 49,408 tokens. A
file appears under its name only when it is whole, so a stopped run is taken up again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import click

import synthetic_checkpoints
import synthetic_danbooru
from kohaku_delta.hub import pins
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.preflight import estimates
from kohaku_delta.sdxl.tokenizer import BEGIN, END, SYMBOLS

POSTS = 7_100_000
PICTURE_EVERY = 4  # posts
SCALE = 1.0  # of the checkpoints' widths; tests rehearse with a small one
SIDE = 64  # pixels
TAR_REVISION = "0" * 40  # the release's tars have none
TOKENS = synthetic_checkpoints.WORDS["vocab_size"]
CHECKPOINT_SPREADS = {"gamma": 0.04, "beta": 0.0, "sdxl": 0.0, "delta_base": 0.02}  # gamma and beta give 0.02


def mirror_files(recipe: Recipe, mirror: Path, folder: Path) -> Iterator[tuple[str, Pin, Path]]:
    """(input's name, its pin, the file) of every file that the recipe reads; those of a span one by one. folder: that
    of params.yaml.
    """
    for name, pin in estimates.needed_pins(recipe):
        for each in pins.expand_span(Pin(url=with_revision(pin.url), bytes=None, sha256=None), Path()):
            file = each.url.removeprefix("file://")
            yield name, pin, folder / file if each.url.startswith("file://") else mirror / pins.hub_file(each).path


def with_revision(url: str) -> str:
    """An hf:// url with a revision; the given one if it has one."""
    if not url.startswith("hf://") or "@" in url:
        return url
    match = pins.HF.match(url)
    return url.replace(match["repo"], f"{match['repo']}@{TAR_REVISION}", 1) if match else url


def make_inputs(files: list[tuple[str, Pin, Path]], scratch: Path) -> None:
    """Make the files that are missing. scratch: a folder on the same file system."""
    missing = [(name, path) for name, _, path in files if not path.is_file()]
    collection = [(name, path) for name, path in missing if name in ("database", "tars")]
    for name, path in missing:
        if (name, path) in collection:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = scratch / path.name
        scratch.mkdir(parents=True, exist_ok=True)
        click.echo(f"{name} → {path}")
        if name in CHECKPOINT_SPREADS:
            place = list(CHECKPOINT_SPREADS).index(name)
            synthetic_checkpoints.checkpoint(whole, 1 + place, SCALE, CHECKPOINT_SPREADS[name])
            free_zeros(whole)
        else:
            whole.write_text(tokenizer_file(path.name), encoding="utf-8", newline="\n")
        os.replace(whole, path)
    if collection:
        click.echo(f"a database of {POSTS:,} posts and its tars: about 15 minutes")
        made = scratch / "danbooru"
        synthetic_danbooru.write(made, POSTS, 1, later=False, side=SIDE, every=PICTURE_EVERY)
        for name, path in collection:
            path.parent.mkdir(parents=True, exist_ok=True)
            own = made / ("danbooru2023.db" if name == "database" else f"images/{path.name}")
            if not own.is_file():  # with fewer posts some tars have none
                own.write_bytes(bytes(1024))
            os.replace(own, path)
    shutil.rmtree(scratch, ignore_errors=True)


def free_zeros(path: Path) -> None:
    """Give zeros back to the disk, where the file system can."""
    if shutil.which("fallocate"):
        subprocess.run(["fallocate", "--dig-holes", str(path)], stderr=subprocess.DEVNULL, check=False)


def tokenizer_file(name: str) -> str:
    """vocab.json or merges.txt of a byte-level BPE with CLIP's number of tokens, each of at most two bytes."""
    single = [*SYMBOLS, *(f"{symbol}</w>" for symbol in SYMBOLS)]
    printable = sorted(SYMBOLS, key=lambda symbol: (ord(symbol) > 126, symbol))
    pairs = [(a, b + end) for a in printable for b in printable for end in ("", "</w>")][: TOKENS - len(single) - 2]
    if name == "merges.txt":
        return "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs)
    tokens = [*single, *(a + b for a, b in pairs), BEGIN, END]
    return json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False)


def hashes(files: list[tuple[str, Pin, Path]], cache: Path) -> dict[Path, tuple[int, str]]:
    """(bytes, sha256) of each file; a file whose size and time are those of the `cache` is not read again."""
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    found = {}
    for _, _, path in files:
        status = path.stat()
        entry = known.get(str(path))
        if not entry or entry[:2] != [status.st_size, status.st_mtime_ns]:
            with path.open("rb") as file:
                entry = [status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        known[str(path)] = entry
        found[path] = (entry[0], entry[2])
    cache.write_text(json.dumps(known))
    return found
