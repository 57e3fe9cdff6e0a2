"""Decides which selected posts are trained on. Every selected post is either trained on or dropped with one reason.

A post is trained on if a tar holds an image for it that can be read, and a caption can be written; its metadata does
not matter. A deleted post whose file is in a tar is trained on, as it was in the release, and `despite` says so. The
reason of a dropped post is the first that applies:

1. no tar holds its file: the reason in the metadata, in the order deleted, banned, hidden (NULL md5 or file_url: for
   gold accounts only), not an image (by file_ext), or "missing from the tars" if the metadata gives none;
2. the file in the tar is not an image, by the extension of its name;
3. caption impossible: the release's tool failed on it (a NULL rating, for example), before anyone looked at the image;
4. unreadable image: truncated, empty, not an image, with more pixels than filter.max_pixels, or with another sha256
   than in the tar's public index;
5. extreme aspect ratio: the longer side has more than filter.max_aspect_ratio times the pixels of the shorter one.
   Resized to cover a bucket, such an image would need the memory of thousands.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta.danbooru import image, tar_index, tars
from kohaku_delta.danbooru.database import Database, positions_of, unique_sorted
from kohaku_delta.danbooru.tar_index import TarMembers
from kohaku_delta.dataset import captions, image_decoding, image_sizes
from kohaku_delta.dataset.post_metadata import REASONS, PostMetadata, post_metadata
from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map
from kohaku_delta.params import Caption, Filter
from kohaku_delta.printing import format_some

NO_IMAGE, MISSING, IMPOSSIBLE, UNREADABLE, EXTREME = range(3, len(REASONS))
KEPT = -1

POSTS = pa.schema(
    [
        ("post_id", pa.int64()),
        ("tar", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("despite", pa.string()),
    ]
)
DROPPED = pa.schema([("post_id", pa.int64()), ("reason", pa.string())])


def filter_posts(
    database: Database,
    files: dict[int, Path],
    ids,
    parameters: Filter,
    caption: Caption,
    index: Path | None = None,
    expected: Collection[int] = tars.MAIN,
) -> tuple[pa.Table, pa.Table]:
    """The posts `ids` (any order, repeats count once) as (POSTS, DROPPED), both ascending. `files`: tars by number
    (tars.tars_in). `index`: where the index of the tars is kept (default: tar_index.default_index_path), and beside it
    which images could be decoded.

    How images are decoded, if not as in the release, is in the metadata of the posts (image.Decoding.of_posts).
    posts.despite is the reason against the post in the metadata, or null. Raises UserError for a damaged tar, and if
    the main tar of a post is `expected` and not among `files`. Posts of tars that are not expected are missing from the
    tars.
    """
    ids = unique_sorted(ids)
    relevant = _relevant_tars(ids, files, expected)
    index_path = index or tar_index.default_index_path(files)
    metadata, possible, members = _read_metadata_and_tars(database, ids, relevant, parameters, caption, index_path)
    tar, row = find_in_tars(ids, members)
    offset, size = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    width, height = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    reason = np.where(metadata.against == KEPT, MISSING, metadata.against).astype(np.int8)

    def check(posts: np.ndarray) -> int:
        """Fills in the arrays for posts of one tar (positions in `ids`)."""
        number = int(tar[posts[0]])
        own, rows = members[number], row[posts]
        offset[posts], size[posts] = own.offset[rows], own.size[rows]
        extensions = own.extension.take(pa.array(rows))
        is_image = pc.is_in(extensions, pa.array(parameters.images)).to_numpy(zero_copy_only=False)
        good = is_image & possible[posts]
        reason[posts] = np.where(is_image, np.where(possible[posts], KEPT, IMPOSSIBLE), NO_IMAGE)
        width[posts[good]], height[posts[good]] = image_sizes.sizes_by_header(
            files[number], own, rows[good], parameters.max_pixels
        )
        reason[posts[good & (width[posts] == 0)]] = UNREADABLE
        return len(posts)

    order = np.argsort(tar, kind="stable")
    order = order[np.searchsorted(tar[order], 0) :]
    groups = np.split(order, np.flatnonzero(np.diff(tar[order])) + 1) if len(order) else []
    with tqdm(total=len(order), desc="images", unit=" images", unit_scale=True, disable=None) as bar:
        for count in ordered_map(check, groups):
            bar.update(count)

    if parameters.image_check == "decode":
        kept = np.flatnonzero(reason == KEPT)
        width[kept], height[kept] = image_decoding.sizes_by_decoding(
            tar[kept],
            offset[kept],
            size[kept],
            width[kept].astype(np.int64) * height[kept],
            files,
            parameters.max_pixels,
            decoding(parameters),
            tar_index.decoded_folder(index_path) if index_path else None,
        )
        reason[kept[width[kept] == 0]] = UNREADABLE
    longer, shorter = np.maximum(width, height).astype(np.int64), np.minimum(width, height).astype(np.int64)
    reason[(reason == KEPT) & (longer > parameters.max_aspect_ratio * shorter)] = EXTREME
    return _as_tables(ids, reason, metadata, files, tar, [offset, size, width, height], decoding(parameters))


def _relevant_tars(ids: np.ndarray, files: dict[int, Path], expected: Collection[int]) -> dict[int, Path]:
    """The tars that may hold one of these posts. Raises UserError as filter_posts does for missing tars."""
    residues = set(np.unique(ids % len(tars.MAIN)).tolist())
    if absent := sorted(residues.intersection(expected) - files.keys()):
        names = format_some((f"data-{number:04d}.tar" for number in absent), 8)
        raise UserError(
            f"{len(absent):,} main tars of selected posts do not exist: {names}. Download them into the tars folder, "
            "set --tars to the right folder, or use only the tars that are there with --partial."
        )
    if not files:
        raise UserError(
            "There is no tar (data-0000.tar …) at all, so no post has an image. Download them, or set --tars."
        )
    any_post = {number for number in files if number == tars.ADD_ON or number >= tars.UPDATES}
    return {number: path for number, path in files.items() if number % 1000 in residues or number in any_post}


def _read_metadata_and_tars(
    database: Database,
    ids: np.ndarray,
    files: dict[int, Path],
    parameters: Filter,
    caption: Caption,
    index_path: Path | None,
) -> tuple[PostMetadata, np.ndarray, dict[int, TarMembers]]:
    """The posts' metadata, whether each can have a caption (bool), and the members of each tar: the database and the
    tars are read at the same time.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            indexing = pool.submit(tar_index.index_tars, files, index_path, stop)
            metadata = post_metadata(database, ids, caption, parameters.images)
            possible = captions.captionable(database, ids, caption, metadata)
            return metadata, possible, indexing.result()
        finally:
            stop.set()


def _as_tables(
    ids: np.ndarray,
    reason: np.ndarray,
    metadata: PostMetadata,
    files: dict[int, Path],
    tar: np.ndarray,
    numbers: list[np.ndarray],
    decoded_as: image.Decoding,
) -> tuple[pa.Table, pa.Table]:
    """(POSTS, DROPPED) from arrays with an entry per post; numbers: offset, size, width and height."""
    kept = np.flatnonzero(reason == KEPT)
    names = pa.array([files[number].name if number in files else None for number in range(max(files) + 1)], pa.string())
    words = pa.array(REASONS)
    against = metadata.against[kept]
    columns = [
        ids[kept],
        names.take(pa.array(tar[kept])),
        *(values[kept] for values in numbers),
        words.take(pa.array(against, mask=against == KEPT)),
    ]
    dropped = np.flatnonzero(reason != KEPT)
    reasons = words.take(pa.array(reason[dropped]))
    posts = pa.table(columns, schema=POSTS.with_metadata(decoded_as.metadata or None))
    return posts, pa.table([ids[dropped], reasons], schema=DROPPED)


def decoding(parameters: Filter) -> image.Decoding:
    """How the recipe decodes images."""
    background = parameters.alpha_background
    return image.Decoding(
        alpha_background=(background[0], background[1], background[2]) if background else None,
        exif_rotation=parameters.exif_rotation,
        reencode_webp=parameters.reencode_webp,
    )


def find_in_tars(ids: np.ndarray, members: dict[int, TarMembers]) -> tuple[np.ndarray, np.ndarray]:
    """Of each post (int64, ascending): the number of the tar that holds its file (int32, -1 for none), and the row
    among its members (int32).

    The first tar that holds it counts: main, recent, add-on, updates from the earliest.
    """
    tar, row = np.full(len(ids), -1, np.int32), np.full(len(ids), -1, np.int32)
    residue = (ids % 1000).astype(np.uint16)
    order = np.argsort(residue, kind="stable")
    by_residue = np.split(order, np.searchsorted(residue[order], np.arange(1, 1000)))
    for number in sorted(members):
        if number <= tars.ADD_ON or number >= tars.UPDATES:
            posts = by_residue[number % 1000] if number < tars.ADD_ON else np.arange(len(ids))
            posts = posts[tar[posts] < 0]
            rows = positions_of(members[number].id, ids[posts])
            tar[posts[rows >= 0]], row[posts[rows >= 0]] = number, rows[rows >= 0]
    return tar, row
