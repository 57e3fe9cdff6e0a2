"""Invariant: selected = trained + dropped, every post on one side, with one reason; the tars decide, the metadata says
why.

A post is trained on when a tar holds an image for it that can be read, and a caption can be written. Nothing else is
asked: a deleted post whose file is in a tar is trained on, as it was in the release, and `despite` says so. The reason
of a dropped post is the first that holds:

1. no tar holds its file: what the metadata says, in the order deleted, banned, hidden (NULL md5 or file_url: for gold
   accounts only),
   not an image (by file_ext), and missing from the tars where the metadata gives no reason at all;
2. the file in the tar is not an image, by its name's extension;
3. caption impossible: the tool that made the captions failed on it (a NULL rating, say), before anyone looked at the
   image;
4. unreadable image: truncated, empty, no picture, with more pixels than filter.max_pixels, or not the bytes that the
   tar's public index names.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta.danbooru import tar_index, tars
from kohaku_delta.danbooru.database import Database, positions_of, unique_sorted
from kohaku_delta.danbooru.tar_index import TarMembers
from kohaku_delta.dataset import captions, image_sizes
from kohaku_delta.dataset.post_metadata import REASONS, post_metadata
from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map
from kohaku_delta.params import Caption, Filter

NO_IMAGE, MISSING, IMPOSSIBLE, UNREADABLE = range(3, len(REASONS))
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
    partial: bool = False,
) -> tuple[pa.Table, pa.Table]:
    """The posts `ids` (any order, repeats count once) as (POSTS, DROPPED), both ascending. `files`: tars by number
    (tars.folder).

    posts.despite is the reason that the metadata would have given, or null. `index` is where the index of the tars is
    kept (members.beside). Refuses when a main tar is not among `files`, unless `partial`: then its posts are missing
    from the tars. Refuses a damaged tar.
    """
    ids = unique_sorted(ids)
    residues = set(np.flatnonzero(np.bincount(ids % 1000)).tolist())
    absent = sorted(residues - files.keys())
    if absent and not partial:
        names = ", ".join(f"data-{number:04d}.tar" for number in absent[:8]) + (" …" if len(absent) > 8 else "")
        raise UserError(
            f"{len(absent):,} main tars of selected posts are not there: {names}. Download them into the tars folder, or name the right folder by --tars, "
            "or take what the tars at hand hold with --partial."
        )
    if not files:
        raise UserError(
            "There is no tar (data-0000.tar …) at all, so no post has an image. Download them, or name their folder by --tars."
        )
    concerned = {number: path for number, path in files.items() if number % 1000 in residues or number == tars.ADD_ON}
    stop = Event()
    with ThreadPoolExecutor(1) as beside:  # SQLite and the tars do not wait for each other
        try:
            listed = beside.submit(tar_index.index_tars, concerned, index or tar_index.default_index_path(files), stop)
            said = post_metadata(database, ids, caption, parameters.images)
            possible = captions.captionable(database, ids, caption, said)
            held = listed.result()
        finally:
            stop.set()
    tar, place = find_in_tars(ids, held)
    offset, size = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    width, height = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    reason = np.where(said.against == KEPT, MISSING, said.against).astype(np.int8)

    def look(posts: np.ndarray) -> int:
        number = int(tar[posts[0]])
        holder, row = held[number], place[posts]
        offset[posts], size[posts] = holder.offset[row], holder.size[row]
        images = pc.is_in(holder.extension.take(pa.array(row)), pa.array(parameters.images)).to_numpy(
            zero_copy_only=False
        )
        good = images & possible[posts]
        reason[posts] = np.where(images, np.where(possible[posts], KEPT, IMPOSSIBLE), NO_IMAGE)
        width[posts[good]], height[posts[good]] = image_sizes.sizes_by_header(
            files[number], holder, row[good], parameters.max_pixels
        )
        reason[posts[good & (width[posts] == 0)]] = UNREADABLE
        return len(posts)

    order = np.argsort((tar + 1).astype(np.uint16), kind="stable")  # sixteen bits: numpy sorts by radix
    order = order[np.searchsorted(tar[order], 0) :]
    groups = np.split(order, np.flatnonzero(np.diff(tar[order])) + 1) if len(order) else []
    with tqdm(total=len(order), desc="images", unit=" images", unit_scale=True, disable=None) as bar:
        for count in ordered_map(look, groups):
            bar.update(count)

    kept = np.flatnonzero(reason == KEPT)
    if parameters.image_check == "decode":
        width[kept], height[kept] = image_sizes.sizes_by_decoding(
            [files[number] for number in tar[kept].tolist()], offset[kept], size[kept], parameters.max_pixels
        )
        reason[kept[width[kept] == 0]] = UNREADABLE
        kept = np.flatnonzero(reason == KEPT)
    names = pa.array([files[number].name if number in files else None for number in range(max(files) + 1)], pa.string())
    words = pa.array(REASONS)
    against = said.against[kept]
    columns = [
        ids[kept],
        names.take(pa.array(tar[kept])),
        offset[kept],
        size[kept],
        width[kept],
        height[kept],
        words.take(pa.array(against, mask=against == KEPT)),
    ]
    dropped = np.flatnonzero(reason != KEPT)
    return pa.table(columns, schema=POSTS), pa.table(
        [ids[dropped], words.take(pa.array(reason[dropped]))], schema=DROPPED
    )


def find_in_tars(ids: np.ndarray, held: dict[int, TarMembers]) -> tuple[np.ndarray, np.ndarray]:
    """Of each post (int64, ascending): the number of the tar that holds its file (int32, -1 for none), and the place
    among its members (int32).

    The first hit wins: main, recent, add-on.
    """
    tar, place = np.full(len(ids), -1, np.int32), np.full(len(ids), -1, np.int32)
    residue = ids % 1000
    order = np.argsort(residue.astype(np.uint16), kind="stable")
    cuts = np.searchsorted(residue[order], np.arange(1001))
    for number in sorted(held):
        if number <= tars.ADD_ON:
            posts = (
                order[cuts[number % 1000] : cuts[number % 1000 + 1]] if number != tars.ADD_ON else np.arange(len(ids))
            )
            posts = posts[tar[posts] < 0]
            found = positions_of(held[number].id, ids[posts])
            tar[posts[found >= 0]], place[posts[found >= 0]] = number, found[found >= 0]
    return tar, place


def format_counts(posts: pa.Table, dropped: pa.Table) -> str:
    """How many posts each reason dropped, and how many are trained on although the metadata speaks against them, as a
    phrase.
    """

    def counted(column: pa.ChunkedArray) -> str:
        counts = {each["values"]: each["counts"] for each in column.drop_null().value_counts().to_pylist()}
        return ", ".join(f"{reason} {counts[reason]:,}" for reason in REASONS if reason in counts) or "none"

    return f"{counted(dropped['reason'])}; trained despite the metadata: {counted(posts['despite'])}"
