"""Writes danbooru2023.db; the same posts give the same bytes with every version of SQLite.

The schema is that of danbooru2023.db in February 2024, as HakuBooru 1b1e940 created it with peewee (names of columns
and indexes, types). Rows are inserted by ascending key, indexes are created at the end, and the library's version in
the header is overwritten with a fixed one.
"""

import sqlite3
from pathlib import Path

from make_miniature.posts import Post, popularity
from make_miniature.words import ARTIST, CHARACTER, COPYRIGHT, GENERAL, META

SCHEMA = """
PRAGMA page_size = 4096;
PRAGMA encoding = 'UTF-8';
PRAGMA auto_vacuum = NONE;
PRAGMA journal_mode = OFF;
PRAGMA secure_delete = ON;
CREATE TABLE "post" ("id" INTEGER NOT NULL PRIMARY KEY, "created_at" VARCHAR(255) NOT NULL, "uploader_id" INTEGER NOT NULL,
 "source" VARCHAR(255) NOT NULL, "md5" VARCHAR(255), "parent_id" INTEGER, "has_children" INTEGER NOT NULL, "is_deleted" INTEGER NOT NULL,
 "is_banned" INTEGER NOT NULL, "pixiv_id" INTEGER, "has_active_children" INTEGER NOT NULL, "bit_flags" INTEGER NOT NULL, "has_large" INTEGER NOT NULL,
 "has_visible_children" INTEGER NOT NULL, "image_width" INTEGER NOT NULL, "image_height" INTEGER NOT NULL, "file_size" INTEGER NOT NULL,
 "file_ext" VARCHAR(255) NOT NULL, "rating" INTEGER, "score" INTEGER NOT NULL, "up_score" INTEGER NOT NULL, "down_score" INTEGER NOT NULL,
 "fav_count" INTEGER NOT NULL, "file_url" VARCHAR(255), "large_file_url" VARCHAR(255), "preview_file_url" VARCHAR(255), "tag_list" TEXT NOT NULL,
 "tag_count" INTEGER NOT NULL, "tag_count_general" INTEGER NOT NULL, "tag_count_artist" INTEGER NOT NULL, "tag_count_character" INTEGER NOT NULL,
 "tag_count_copyright" INTEGER NOT NULL, "tag_count_meta" INTEGER NOT NULL);
CREATE TABLE "tag" ("id" INTEGER NOT NULL PRIMARY KEY, "name" VARCHAR(255) NOT NULL, "type" INTEGER NOT NULL, "popularity" INTEGER NOT NULL);
CREATE TABLE "posttagrelation" ("id" INTEGER NOT NULL PRIMARY KEY, "post_id" INTEGER NOT NULL, "tag_id" INTEGER NOT NULL,
 FOREIGN KEY ("post_id") REFERENCES "post" ("id"), FOREIGN KEY ("tag_id") REFERENCES "tag" ("id"));
"""  # the text of the statements is part of the file
INDEXES = """
CREATE UNIQUE INDEX "tag_name" ON "tag" ("name");
CREATE INDEX "posttagrelation_post_id" ON "posttagrelation" ("post_id");
CREATE INDEX "posttagrelation_tag_id" ON "posttagrelation" ("tag_id");
"""
WRITER = (3_040_001).to_bytes(4, "big")  # the version of the library that wrote the file, in the header's bytes 96–99
ADDRESS = "https://cdn.example"


def base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def row(post: Post, numbers: dict, size: int) -> tuple:
    """One row of `post`. size: bytes of the picture as the original site would have had it."""
    count = {kind: sum(type == kind for _, type in post.tags) for kind in range(5)}
    visible = post.md5 is not None
    address = f"{post.md5}.{post.ext}" if visible else None
    large = post.scene.width * post.scene.height > 30_000
    return (
        post.id,
        post.created_at,
        1 + post.id * 31 % 977,
        f"https://art.example/{post.id * 7 % 100_000}" if post.id % 3 else "",
        post.md5,
        post.parent_id,
        post.has_children,
        post.awkward.startswith("deleted"),
        post.awkward.startswith("banned"),
        post.id * 11 % 120_000_000 if post.id % 2 else None,
        post.has_children,
        0,
        large,
        post.has_children,
        post.scene.width * 8,
        post.scene.height * 8,
        size,
        post.ext,
        post.rating,
        post.score,
        post.score + post.down_score,
        -post.down_score,
        post.fav_count,
        f"{ADDRESS}/o/{address}" if visible else None,
        f"{ADDRESS}/{'s' if large else 'o'}/{address}" if visible else None,
        f"{ADDRESS}/p/{post.md5}.jpg" if visible else None,
        "".join(f"${base36(numbers[tag])}#" for tag in post.tags),
        len(post.tags),
        count[GENERAL],
        count[ARTIST],
        count[CHARACTER],
        count[COPYRIGHT],
        count[META],
    )


def write(posts: list[Post], sizes: dict[int, int], path: Path) -> None:
    """Write the database of these posts (ascending by id). sizes: {post id: bytes of its image}."""
    path.unlink(missing_ok=True)
    known = popularity(posts)
    numbers = {
        tag: 2 + place * 5 for place, tag in enumerate(known)
    }  # in the order of first use, with gaps, as ids are
    pairs = [(post.id, numbers[tag]) for post in posts for tag in post.tags]
    pairs += [(post.id, numbers[tag]) for post in posts for tag in post.repeated]
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(SCHEMA)
    connection.execute("BEGIN")
    connection.executemany(
        f"INSERT INTO post VALUES ({', '.join('?' * 33)})",
        (row(post, numbers, sizes.get(post.id, 0)) for post in posts),
    )
    connection.executemany(
        "INSERT INTO tag VALUES (?, ?, ?, ?)", ((numbers[tag], tag[0], tag[1], count) for tag, count in known.items())
    )
    connection.executemany(
        "INSERT INTO posttagrelation VALUES (?, ?, ?)", ((place, *pair) for place, pair in enumerate(pairs, 1))
    )
    connection.execute("COMMIT")
    connection.executescript(INDEXES)
    connection.close()
    with open(path, "r+b") as file:
        file.seek(96)
        file.write(WRITER)
