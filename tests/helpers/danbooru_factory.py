"""Databases and tars in danbooru2023's layout for the tests, and a slow, obvious reference of the release's selection
and captions.

The reference asks SQLite for one post at a time and joins strings in Python; it shares no code with kohaku_delta.
"""

import io
import random
import sqlite3
import tarfile
from datetime import datetime

from dateutil.parser import parser, parserinfo
from PIL import Image

from kohaku_delta.danbooru.database import Database

COUNTS = ["tag_count", *(f"tag_count_{kind}" for kind in ("general", "artist", "character", "copyright", "meta"))]
COLUMNS = {
    "id": "INTEGER NOT NULL PRIMARY KEY", "created_at": "VARCHAR(255)", "uploader_id": "INTEGER",
    "source": "VARCHAR(255)", "md5": "VARCHAR(255)", "parent_id": "INTEGER", "has_children": "INTEGER",
    "is_deleted": "INTEGER", "is_banned": "INTEGER", "pixiv_id": "INTEGER", "has_active_children": "INTEGER",
    "bit_flags": "INTEGER", "has_large": "INTEGER", "has_visible_children": "INTEGER", "image_width": "INTEGER",
    "image_height": "INTEGER", "file_size": "INTEGER", "file_ext": "VARCHAR(255)", "rating": "INTEGER",
    "score": "INTEGER", "up_score": "INTEGER", "down_score": "INTEGER", "fav_count": "INTEGER",
    "file_url": "VARCHAR(255)", "large_file_url": "VARCHAR(255)", "preview_file_url": "VARCHAR(255)",
}  # fmt: skip
GOOD = {
    "created_at": "2019-06-03T11:20:00.000-04:00", "md5": "0" * 32, "file_ext": "png", "rating": 0, "fav_count": 5,
    "is_deleted": 0, "is_banned": 0, "file_url": "https://example.org/original.png",
}  # fmt: skip
RATINGS = {0: "general", 1: "sensitive", 2: "questionable", 3: "explicit"}
GENERAL, ARTIST, CHARACTER, COPYRIGHT, META = range(5)
TODAY = parserinfo()
TODAY._year, TODAY._century = 2024, 2000  # what the release's tool took from the clock


def write_database(path, posts, tags=(), pairs=(), later=False):
    """posts: dicts over GOOD; tags: (id, name, type); pairs: (post_id, tag_id) in the order of their ids. `later`: the
    schema of later revisions.
    """
    extra = {"updated_at": "VARCHAR(255)"} if later else {"tag_list": "TEXT", **dict.fromkeys(COUNTS, "INTEGER")}
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            f"CREATE TABLE post ({', '.join(f'{name} {kind}' for name, kind in {**COLUMNS, **extra}.items())})"
        )
        connection.execute(
            "CREATE TABLE tag (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255) UNIQUE, type INTEGER, "
            "popularity INTEGER)"
        )
        connection.execute(
            "CREATE TABLE posttagrelation (id INTEGER NOT NULL PRIMARY KEY, post_id INTEGER, tag_id INTEGER)"
        )
        for post in posts:
            row = {**GOOD, **post}
            connection.execute(
                f"INSERT INTO post ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values())
            )
        connection.executemany("INSERT INTO tag (id, name, type, popularity) VALUES (?, ?, ?, 1)", tags)
        connection.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
        connection.execute("CREATE INDEX pair_post ON posttagrelation (post_id)")
        connection.execute("CREATE INDEX pair_tag ON posttagrelation (tag_id)")
    connection.close()
    return path


def picture(width=24, height=16, kind="WEBP", mode="RGB", **options):
    """An image file's bytes."""
    file = io.BytesIO()
    Image.new(mode, (width, height), 77).save(file, kind, **options)
    return file.getvalue()


def change(path, *statements) -> Database:
    """The database after these SQL statements."""
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return Database(path)


def write_tar(path, members, form=tarfile.GNU_FORMAT):
    """members: (name, bytes) pairs, or TarInfo objects that carry no data."""
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def choose(ids, seed, ranges):
    """The release's selection by Python's own random: id → how often. ranges: (from, below, draw)."""
    numbers, drawn = random.Random(seed), {}
    for start, below, draw in ranges:
        population = [post for post in sorted(ids) if post >= start and (below is None or post < below)]
        for post in population if draw == "all" else numbers.choices(population, k=draw):
            drawn[post] = drawn.get(post, 0) + 1
    return drawn


def caption(connection, post, parameters):
    """(keep, general, caption) of one post, or None where the release's tool failed. parameters: recipe.caption."""
    created, rating, favourites = connection.execute(
        "SELECT created_at, rating, fav_count FROM post WHERE id = ?", (post,)
    ).fetchone()
    if rating is not None and not -4 <= rating <= 3:
        return None
    rating = rating if rating is None else list(RATINGS)[rating]  # as Python's lists do: -1 is the last
    classes = {kind: [] for kind in range(5)}
    rows = connection.execute(
        "SELECT tag.name, tag.type FROM posttagrelation JOIN tag ON tag.id = posttagrelation.tag_id "
        "WHERE post_id = ? ORDER BY posttagrelation.id",
        (post,),
    )
    for name, kind in rows:
        if kind is None:
            continue
        if not -5 <= kind <= 4 or name is None:
            return None
        if name.strip():
            classes[kind % 5].append(name)

    def shown(names):
        return [name if len(name) <= 3 else name.replace("_", " ") for name in names]

    special = [name for name in classes[GENERAL] if name in parameters.special]
    keep = shown(special) + shown(classes[CHARACTER]) + shown(classes[COPYRIGHT]) + shown(classes[ARTIST])
    general = shown([name for name in classes[GENERAL] if name not in parameters.special])
    general += shown([name for name in classes[META] if not any(part in name for part in parameters.dropped_meta)])

    try:
        year = parser(TODAY).parse(created, default=datetime(2024, 2, 14)).year
    except Exception:
        year = 0
    if 2005 <= year <= 2010:
        general.append("old")
    elif year <= 2014:
        general.append("early")
    elif year <= 2017:
        general.append("mid")
    elif year <= 2020:
        general.append("recent")
    elif year <= 2024:
        general.append("newest")
    general += {None: [], 0: ["safe"], 1: ["sensitive"], 2: ["nsfw"], 3: ["explicit", "nsfw"]}[rating]
    if post <= 7_000_000:
        if rating is None or favourites is None:
            return None
        thresholds = {
            0: (1, 3, 8, 16, 22, 37),
            1: (2, 6, 15, 30, 44, 81),
            2: (8, 18, 38, 75, 105, 182),
            3: (9, 22, 52, 106, 151, 262),
        }[rating]
        words = [
            "worst quality",
            "low quality",
            "normal quality",
            "good quality",
            "great quality",
            "best quality",
            "masterpiece",
        ]
        general.append(words[sum(favourites > threshold for threshold in thresholds)])
    return keep, general, ", ".join(keep) + ", |||" + ", ".join(general)
