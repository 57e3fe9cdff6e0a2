"""Makes a collection in danbooru2023's layout, a database and its tars, of any size; (posts, seed) give the same bytes
on every host.

Run: `python benchmarks/synthetic_danbooru.py work/bench/200000 --posts 200000`. A million posts (37 million tag pairs)
take about two minutes: numpy draws, Arrow builds the texts, ADBC writes rows in C. Tags are Zipf-like, about 35 per
post. Two posts in a hundred are odd in one of the ways of ODD, and some tag names are: some that the release's tool
could read, and some that it could read but not caption. Tars hold real WebP files of one colour: real sizes in about a
hundred bytes.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import adbc_driver_sqlite.dbapi
import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from tqdm import tqdm

CHUNK = 1 << 17  # posts
LAST = 7_120_000  # ids lie below
RECENT, ADDED = 6_000_000, 7_100_000  # the first ids of the recent tars and of the add-on tar
LATE = 50  # of a chunk's pairs one in so many is written after all others, as tags that were added later are

POST = {
    "id": "INTEGER NOT NULL PRIMARY KEY", "created_at": "VARCHAR(255)", "uploader_id": "INTEGER",
    "source": "VARCHAR(255)", "md5": "VARCHAR(255)",
    "parent_id": "INTEGER", "has_children": "INTEGER", "is_deleted": "INTEGER", "is_banned": "INTEGER",
    "pixiv_id": "INTEGER",
    "has_active_children": "INTEGER", "bit_flags": "INTEGER", "has_large": "INTEGER",
    "has_visible_children": "INTEGER", "image_width": "INTEGER",
    "image_height": "INTEGER", "file_size": "INTEGER", "file_ext": "VARCHAR(255)", "rating": "INTEGER",
    "score": "INTEGER", "up_score": "INTEGER",
    "down_score": "INTEGER", "fav_count": "INTEGER", "file_url": "VARCHAR(255)", "large_file_url": "VARCHAR(255)",
    "preview_file_url": "VARCHAR(255)",
}  # fmt: skip
COUNTS = {f"tag_count{kind}": "INTEGER" for kind in ("", "_general", "_artist", "_character", "_copyright", "_meta")}
EARLIER, LATER = {"tag_list": "TEXT", **COUNTS}, {"updated_at": "VARCHAR(255)"}  # the two schemas of danbooru2023
TAG = {"id": "INTEGER NOT NULL PRIMARY KEY", "name": "VARCHAR(255)", "type": "INTEGER", "popularity": "INTEGER"}
RELATION = {"id": "INTEGER NOT NULL PRIMARY KEY", "post_id": "INTEGER NOT NULL", "tag_id": "INTEGER NOT NULL"}
INDEXES = {
    "tag_name": "tag (name)",
    "posttagrelation_post_id": "posttagrelation (post_id)",
    "posttagrelation_tag_id": "posttagrelation (tag_id)",
}

GENERAL, ARTIST, CHARACTER, COPYRIGHT, META = range(5)
KINDS = {
    GENERAL: ("general", 0.10, 30.0),
    ARTIST: ("artist", 0.55, 1.0),
    CHARACTER: ("character", 0.26, 1.6),
    COPYRIGHT: ("series", 0.08, 1.5),
    META: ("meta", 0.01, 4.0),
}
KNOWN = {
    GENERAL: "1girl solo long_hair breasts 1boy 2girls male_focus multiple_girls ^_^ o_o :d 3girls "
    "multiple_boys 2boys 4girls 1other 6+girls 5girls 3boys 6+boys 4boys "
    "5boys 2others multiple_others 3others 6+others 4others 5others _ _a__ a_b",
    META: "highres absurdres commentary_request commentary bad_id translated translation_request md5_mismatch "
    "revision video has_audio photoshop_(medium) "
    "artist_request scan a_c third-party_edit resolution_mismatch",
    ARTIST: "banned_artist male_focus_(artist) x_y", CHARACTER: "hatsune_miku rice_shower_(umamusume) o-o",
    COPYRIGHT: "original touhou_project 1girl_(series)",
}  # fmt: skip
# fmt: skip
ODD_NAMES = [
    "comma,_inside",
    "spaces inside it",
    "bar|||bar",
    "初音ミク_(例)",
    "é_è",
    "\u3000 ",
    " ",
    "",
    "quote'\"",
    "back\\slash",
    "tab\tand_line\nfeed",
    "👩‍👩‍👧_👧",
    "İstanbul_ß",
    "nul_\u2028_sep",
]
ODD_DATES = [
    None, "", "unknown", "2023-02-30T00:00:00.000-05:00", "0000-00-00T00:00:00", "2015", "2015-13-05", "13/02/2019",
    "Feb 3 2011 10:00", "15-03-02", "2025-01-01T00:00:00Z",
    "2004-12-31T23:59:59.000-05:00", "1999-01-01 00:00", "2010-12-31T23:59:59.999-12:00",
    "2011-01-01T00:00:00.000+14:00", "20140630T101112", "12:30", "2024-02-29T00:00:00Z",
    "2030-01-01T00:00:00.000-05:00", "10000-01-01", "2019-06-03T11:20:00.000-99:00", "2016-06-03T25:00:00",
    "２０１７-01-01", "2017-06-03T11:20:00.000 -04:00", "Thu Sep 25 2003",
]  # fmt: skip
ODD = (
    "date",
    "no rating",
    "no favourites",
    "repeated",
    "no tags",
    "deleted",
    "deleted but there",
    "banned",
    "hidden",
    "film",
    "missing",
    "in two tars",
    "edge",
)
EDGES = (1, 2, 3, 6, 8, 9, 15, 16, 18, 22, 30, 37, 38, 44, 52, 75, 81, 105, 106, 151, 182, 262)


@dataclass(frozen=True)
class Posts:
    """A chunk of posts: ids ascending (int64), how each is odd (place in ODD, -1 for not at all), and the pairs (place
    in the chunk, tag's place).
    """

    id: np.ndarray
    odd: np.ndarray
    post: np.ndarray
    tag: np.ndarray


def vocabulary(count: int) -> pa.Table:
    """About `count` tags, most frequent first in each type: id, name, type."""
    names, types = [], []
    for kind, (word, share, _) in KINDS.items():
        known = KNOWN[kind].split() + (
            ODD_NAMES if kind == GENERAL else [f"{name} ({word})" for name in ODD_NAMES if name.strip()]
        )
        names += known + [
            f"{word}_of_{place}_({'abcdefgh'[place % 8] * (place % 9)})"
            for place in range(max(4, int(count * share) - len(known)))
        ]
        types += [kind] * (len(names) - len(types))
    names += ["tag_without_type", "tag_of_unknown_type", None]
    types += [None, 9, GENERAL]
    return pa.table(
        {"id": np.arange(2, 2 + 3 * len(names), 3), "name": pa.array(names), "type": pa.array(types, pa.int64())}
    )


def spread(posts: int, seed: int) -> np.ndarray:
    """The ids: ascending, over the whole range, on so many residues mod 1000 that tars are as long as the real ones."""
    rng = np.random.default_rng([seed, 0])
    residues = np.sort(rng.choice(1000, size=int(np.clip(posts // 7100 + 1, 2, 1000)), replace=False))
    pool = (np.arange(LAST // 1000)[:, None] * 1000 + residues).reshape(-1)
    pool = pool[pool > 0]
    if posts > len(pool):
        raise click.ClickException(f"There are only {len(pool):,} ids for {posts:,} posts. Ask for fewer.")
    keep = np.zeros(len(pool), bool)
    keep[rng.permutation(len(pool))[:posts]] = True
    return pool[keep]


def chunks(ids: np.ndarray, tags: pa.Table, seed: int) -> Iterator[Posts]:
    """The posts in chunks. A tag's rank in its type is a power of a uniform number: few tags are everywhere, most are
    rare.
    """
    types = tags["type"].fill_null(-1).to_numpy()
    last = len(types) - 1
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        rng = np.random.default_rng([seed, 1, start])
        odd = np.where(rng.random(len(part)) < 0.02, rng.integers(0, len(ODD), len(part)), -1).astype(np.int8)
        pairs = []
        for kind, (_, _, mean) in KINDS.items():
            places = np.flatnonzero(types == kind)
            places = places[places != last]
            count = rng.poisson(mean, len(part))
            rank = (len(places) * rng.random(count.sum()) ** 3).astype(np.int64)
            pairs.append(np.repeat(np.arange(len(part)), count) << 32 | places[rank])
        for place in range(last - 2, last + 1):  # without type, of unknown type, without name: a few posts each
            pairs.append(np.flatnonzero(rng.random(len(part)) < 0.0005) << 32 | place)
        pairs = np.sort(np.concatenate(pairs))
        pairs = pairs[np.flatnonzero(np.diff(pairs, prepend=-1))]
        pairs = pairs[odd[pairs >> 32] != ODD.index("no tags")]
        again = pairs[odd[pairs >> 32] == ODD.index("repeated")]
        pairs = np.concatenate([pairs, again[rng.random(len(again)) < 0.3]])
        order = np.argsort(
            (pairs >> 32) + rng.random(len(pairs)), kind="stable"
        )  # a post's tags together, in any order
        yield Posts(part, odd, (pairs >> 32)[order], (pairs & 0xFFFFFFFF)[order])


def rows(posts: Posts, tags: pa.Table, seed: int, later: bool) -> pa.Table:
    """The rows of table post."""
    rng = np.random.default_rng([seed, 2, int(posts.id[0])])
    count, odd, zero = len(posts.id), posts.odd, np.zeros(len(posts.id), np.int64)

    def is_odd(*names: str) -> np.ndarray:
        return np.isin(odd, [ODD.index(name) for name in names])

    seconds = 1_116_900_000 + (posts.id * (590_000_000 / LAST)).astype(np.int64)
    summer = (seconds // 2_629_800 % 12 >= 3) & (seconds // 2_629_800 % 12 < 10)
    created = pc.binary_join_element_wise(
        np.datetime_as_string(seconds.astype("datetime64[s]")).tolist(),
        np.char.zfill((posts.id % 1000).astype(str), 3).tolist(),
        ".",
    )
    created = pc.binary_join_element_wise(created, pc.if_else(pa.array(summer), "-04:00", "-05:00"), "")
    dates = pa.array(ODD_DATES).take(pa.array(rng.integers(0, len(ODD_DATES), count)))
    created = pc.if_else(pa.array(is_odd("date")), dates, created)
    rating = rng.choice(4, count, p=[0.45, 0.33, 0.12, 0.10])
    favourites = np.where(is_odd("edge"), rng.choice(EDGES, count), rng.exponential(20 + 30 * rating))
    texts = pa.array([f"{number:08x}" * 4 for number in rng.integers(0, 1 << 32, 4096)])
    md5 = texts.take(pa.array(rng.integers(0, 4096, count)))
    hidden = pa.array(is_odd("hidden"))
    address = pc.binary_join_element_wise(
        "https://cdn.example/original/00/11/__some_words_drawn_by_someone__", md5, ".jpg", ""
    )
    width, height = rng.integers(300, 4000, count), rng.integers(300, 4000, count)
    types = tags["type"].fill_null(-1).to_numpy()[posts.tag]
    columns = {
        "id": posts.id, "created_at": created, "uploader_id": rng.integers(1, 10**6, count), "source": address,
        "md5": pc.if_else(hidden, None, md5),
        "parent_id": pa.array(posts.id - 7, mask=rng.random(count) < 0.9), "has_children": zero,
        "is_deleted": is_odd("deleted", "deleted but there").astype(np.int64),
        "is_banned": is_odd("banned").astype(np.int64), "pixiv_id": pa.array(rng.integers(1, 10**8, count),
        mask=rng.random(count) < 0.4), "has_active_children": zero,
        "bit_flags": zero, "has_large": zero + 1, "has_visible_children": zero, "image_width": width,
        "image_height": height, "file_size": width * height // 5,
        "file_ext": pc.if_else(pa.array(is_odd("film")), "mp4", pc.if_else(pa.array(rng.random(count) < 0.6), "jpg",
        "png")),
        "rating": pa.array(rating, mask=is_odd("no rating")), "score": favourites.astype(np.int64),
        "up_score": favourites.astype(np.int64), "down_score": zero,
        "fav_count": pa.array(favourites.astype(np.int64), mask=is_odd("no favourites")),
        "file_url": pc.if_else(hidden, None, address),
        "large_file_url": pc.if_else(hidden, None, address), "preview_file_url": pc.if_else(hidden, None, address),
    }  # fmt: skip
    if later:
        return pa.table({**columns, "updated_at": created})
    numbers = pc.binary_join_element_wise(
        "$", pa.array([np.base_repr(number, 36).lower() for number in tags["id"].to_pylist()]), "#", ""
    )
    offsets = np.searchsorted(posts.post, np.arange(count + 1)).astype(np.int32)
    columns["tag_list"] = pc.binary_join(
        pa.ListArray.from_arrays(pa.array(offsets), numbers.take(pa.array(posts.tag))), ""
    )
    for name, kind in zip(COUNTS, (None, GENERAL, ARTIST, CHARACTER, COPYRIGHT, META), strict=True):
        columns[name] = np.bincount(posts.post[types == kind] if kind is not None else posts.post, minlength=count)
    return pa.table(columns)


def members(posts: Posts, seed: int, every: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tar holds which post: (tar, id, picture), all int64; main tars below 1000, the recent ones from 1000, the
    add-on tar 2000. every: one in so many posts of each tar has a picture.
    """
    rng = np.random.default_rng([seed, 3, int(posts.id[0])])
    absent = np.isin(posts.odd, [ODD.index(name) for name in ("deleted", "banned", "hidden", "film", "missing")])
    absent |= posts.id // 1000 % every != 0
    ids = posts.id[~absent]
    tar = np.select([ids >= ADDED, ids >= RECENT], [2000, ids % 1000 + 1000], ids % 1000)
    again = posts.id[(posts.odd == ODD.index("in two tars")) & (posts.id < RECENT) & ~absent]
    tar, ids = np.concatenate([tar, again % 1000 + 1000]), np.concatenate([ids, again])
    return tar, ids, rng.integers(0, 64, len(ids))


def pictures(side: int | None = None) -> np.ndarray:
    """64 webp files of many shapes, or squares of `side` pixels, each padded to a tar's block, and their sizes in the
    last two bytes: (64, 514) uint8.
    """
    rng = np.random.default_rng(4)
    files = []
    for place in range(64):
        area, ratio = (
            rng.uniform(3e5, 4e6),
            rng.choice([1, 3 / 4, 2 / 3, 4 / 3, 3 / 2, 16 / 9, 9 / 16, 1 / 3, 3]) * rng.uniform(0.95, 1.05),
        )
        size = (side, side) if side else (int((area * ratio) ** 0.5), int((area / ratio) ** 0.5))
        file = io.BytesIO()
        Image.new("RGB", size, (place * 3, 100, 200)).save(file, "WEBP", lossless=True, method=0)
        data = file.getvalue()
        files.append(data.ljust(512, b"\0") + len(data).to_bytes(2, "little"))
    return np.frombuffer(b"".join(files), np.uint8).reshape(64, 514)


def blocks(ids: np.ndarray, picture: np.ndarray, files: np.ndarray) -> bytes:
    """Members of a tar (ustar), a header's block and a file's block each."""
    data = np.zeros((len(ids), 1024), np.uint8)
    data[:, 512:] = files[picture, :512]
    size = files[picture, 512].astype(np.int64) | files[picture, 513].astype(np.int64) << 8
    fields = {
        0: np.char.add(ids.astype("S20"), b".webp"),
        100: b"0000644\0",
        108: b"0000000\0",
        116: b"0000000\0",
        136: b"14556736000\0",
        148: b" " * 8,
        156: b"0",
        257: b"ustar\00000",
    }
    for place, text in fields.items():
        text = (
            np.broadcast_to(np.asarray(text), len(ids))
            if not isinstance(text, bytes)
            else np.full(len(ids), text, f"S{len(text)}")
        )
        data[:, place : place + text.dtype.itemsize] = np.ascontiguousarray(text).view(np.uint8).reshape(len(ids), -1)
    for place, width, number in ((124, 11, size), (148, 6, None)):
        number = data[:, :512].sum(axis=1, dtype=np.int64) if number is None else number
        for digit in range(width):
            data[:, place + width - 1 - digit] = ord("0") + (number >> 3 * digit & 7)
    data[:, 154] = 0  # the checksum's field: six digits, NUL, space
    return data.tobytes()


def write(folder: Path, posts: int, seed: int, later: bool, side: int | None = None, every: int = 1) -> int:
    """The collection into `folder` (danbooru2023.db, images/): one in `every` posts with a picture, a square of `side`
    pixels or of many shapes. Returns the number of tag pairs.
    """
    tags, ids, files = vocabulary(max(2000, posts // 15)), spread(posts, seed), pictures(side)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "danbooru2023.db"
    for old in (path, *(folder / "images").glob("data-*.tar")):
        old.unlink(missing_ok=True)
    numbers = tags["id"].to_numpy()
    popularity, pairs, late = np.zeros(len(numbers), np.int64), 0, []
    with (
        adbc_driver_sqlite.dbapi.connect(path.resolve().as_uri(), autocommit=True) as connection,
        connection.cursor() as cursor,
    ):
        tables = {"post": POST | (LATER if later else EARLIER), "tag": TAG, "posttagrelation": RELATION}
        created = [
            f"CREATE TABLE {name} ({', '.join(f'{column} {kind}' for column, kind in columns.items())})"
            for name, columns in tables.items()
        ]
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "PRAGMA cache_size = -262144",
            *created,
        ):
            cursor.execute(statement)
        for chunk in tqdm(
            chunks(ids, tags, seed), total=-(-posts // CHUNK), desc="posts", unit_scale=CHUNK, disable=None
        ):
            cursor.adbc_ingest("post", rows(chunk, tags, seed, later), mode="append")
            popularity += np.bincount(chunk.tag, minlength=len(numbers))
            now = np.arange(len(chunk.post)) % LATE != 0
            late.append(np.stack([chunk.id[chunk.post[~now]], numbers[chunk.tag[~now]]]))
            pairs = _relate(cursor, pairs, chunk.id[chunk.post[now]], numbers[chunk.tag[now]])
            tar, post, picture = members(chunk, seed, every)
            order = np.argsort(tar, kind="stable")
            cuts = np.flatnonzero(np.diff(tar[order])) + 1
            for part in np.split(order, cuts):
                with open(folder / "images" / f"data-{tar[part[0]]:04d}.tar", "ab") as file:
                    file.write(blocks(post[part], picture[part], files))
        pairs = _relate(cursor, pairs, *np.concatenate(late, axis=1))
        cursor.adbc_ingest("tag", tags.append_column("popularity", pa.array(popularity)), mode="append")
        for name, place in tqdm(INDEXES.items(), desc="indexes", disable=None):
            cursor.execute(f"CREATE INDEX {name} ON {place}")
    for residue in np.unique(ids % 1000):
        (folder / "images" / f"data-{residue:04d}.tar").touch()
    for tar in (folder / "images").glob("data-*.tar"):
        with open(tar, "ab") as file:
            file.write(bytes(1024))
    return pairs


def _relate(cursor, before: int, post: np.ndarray, tag: np.ndarray) -> int:
    cursor.adbc_ingest(
        "posttagrelation",
        pa.table({"id": np.arange(before + 1, before + 1 + len(post)), "post_id": post, "tag_id": tag}),
        mode="append",
    )
    return before + len(post)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--posts", default=200_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--later", is_flag=True, help="The schema of later revisions: no tag_list, no counts, updated_at.")
def main(folder: Path, posts: int, seed: int, later: bool) -> None:
    """A collection of any size in danbooru2023's layout."""
    click.echo(f"{posts:,} posts, {write(folder, posts, seed, later):,} tag pairs → {folder}")


if __name__ == "__main__":
    main()
