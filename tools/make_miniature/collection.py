"""Writes the fast part of data/ (database, tars, tokenizers) from the posts alone, in seconds."""

from pathlib import Path

from make_miniature import database, tars, tokenizer
from make_miniature.posts import posts


def write(out: Path) -> None:
    """Write danbooru2023.db, images/data-XXXX.tar, tokenizer/ and tokenizer_2/ into `out`."""
    everything = posts()
    sizes = tars.write(everything, out / "images")
    database.write(everything, sizes, out / "danbooru2023.db")
    tokenizer.write(everything, [out / "tokenizer", out / "tokenizer_2"])
