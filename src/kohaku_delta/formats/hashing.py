"""Invariant: a file's sha256 is that of the bytes that lie on the disk now; it is never remembered from another time."""

import hashlib
from collections.abc import Callable
from pathlib import Path

PIECE = 1 << 20


def hash_file(
    path: Path, advance: Callable[[int], object] = lambda count: None, start: bytes = b"", algorithm: str = "sha256"
) -> str:
    """The digest of a file in hex; `start` goes before its bytes. `advance` hears how many bytes were read."""
    digest = hashlib.new(algorithm, start)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()
