"""Writes the tars; the same posts give the same bytes: members by ascending id, fixed owner and time in the headers.

The layout is danbooru2023's: data-0000 … by id % 1000, recent posts from data-1000 on, the add-on tar data-2000.
"""

import io
import tarfile
from pathlib import Path

import numpy as np

from make_miniature.drawing import draw, webp
from make_miniature.posts import Post

FOLDER = "update-2024"  # later tars have this folder in the names of some members


def picture(post: Post) -> bytes:
    """The image file of this post in its tar, broken as the post demands."""
    pixels = draw(post.scene)
    if post.awkward == "alpha":
        alpha = np.full(pixels.shape[:2], 255, np.uint8)
        alpha[:, : pixels.shape[1] // 4] = 0
        pixels = np.dstack([pixels, alpha])
    content = webp(pixels)
    return {"cut_body": content[: len(content) // 2], "cut_head": content[:14], "empty": b""}.get(post.awkward, content)


def member(post: Post, size: int) -> tarfile.TarInfo:
    in_folder = post.tar >= 1000 and post.id // 1000 % 4 == 0
    entry = tarfile.TarInfo(f"{FOLDER}/{post.id}.webp" if in_folder else f"{post.id}.webp")
    entry.size, entry.mode, entry.mtime = size, 0o644, 1_706_832_000
    return entry


def write(posts: list[Post], folder: Path) -> dict[int, int]:
    """Write all tars of these posts into the folder. Returns {post id: bytes of its image}."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("data-*.tar"):
        old.unlink()
    sizes, tars = {}, {}
    for post in posts:
        if post.tar is not None:
            tars.setdefault(post.tar, []).append(post)
    for number, held in sorted(tars.items()):
        with tarfile.open(folder / f"data-{number:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for post in held:
                content = picture(post)
                sizes[post.id] = len(content)
                tar.addfile(member(post, len(content)), io.BytesIO(content))
    return sizes
