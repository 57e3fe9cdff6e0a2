"""Invariant: a file is called a published one only where its sha256 is the pinned one; a shorter pin says that it is
shorter.
"""

from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.params import Recipe


@dataclass(frozen=True)
class PublishedHash:
    """A file that the recipe has a sha256 of (whole, or its first digits)."""

    name: str
    sha256: str
    bytes: int | None


def published_hashes(recipe: Recipe) -> list[PublishedHash]:
    """What the release published, then its inputs. Refuses a recipe that pins nothing published."""
    if recipe.published is None:
        raise UserError(
            "This recipe has no published files to compare with (its section published is null). Name the release's params.yaml with --params."
        )
    files = [
        PublishedHash(f"published.{name}", pin.sha256, pin.bytes)
        for name, pin in recipe.published
        if hasattr(pin, "sha256")
    ]
    pins = [
        (name, pin)
        for name, pins in recipe.download.inputs.items()
        for pin in (pins if isinstance(pins, list) else [pins])
    ]
    return files + [PublishedHash(f"download.inputs.{name}", pin.sha256, pin.bytes) for name, pin in pins if pin.sha256]


def sha256(path: Path) -> str:
    """Of the file at `path`, read once. Refuses a folder: no folder's hash was published."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; only single files were published with a hash. Compare it with a folder, or with the single file: kohaku-delta tensors A B."
        )
    if not path.is_file():
        raise UserError(f"{path} is not there. Check the path.")
    return hash_file(path)


def identify_file(digest: str, files: list[PublishedHash]) -> list[PublishedHash]:
    """Which of `files` have this sha256; one file may stand under several names."""
    return [file for file in files if digest.startswith(file.sha256)]
