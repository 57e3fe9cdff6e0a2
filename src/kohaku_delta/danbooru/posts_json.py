"""Converts posts.json (JSON Lines, a post per line as Danbooru's API gives it) into a database that the stages read as
danbooru2023.db.

The file is read as a stream: a line has at most LONGEST bytes, and memory does not grow with the file, only with the
number of different tags. A line that is not such a post is refused and named by its number. If an id is in several
lines, the last one counts.

The database is kept in the mirror as converted/<sha256 of posts.json>/danbooru2023.db, with a note beside it of what
wrote it and of its own sha256. It is written again unless both are as noted. The same posts.json gives the same bytes
on every host, because the library that writes it (ADBC with its own SQLite) is locked.

Order of tags: those of a line, class by class, as its tag_string_… list them; Danbooru writes them alphabetically.
A tag's class is that of its tag_string_… in the same line, so a name may be two tags if the lines disagree.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Annotated, Literal

import adbc_driver_manager
import adbc_driver_sqlite.dbapi
import numpy as np
import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError

from kohaku_delta import strict_model
from kohaku_delta.atomic_files import atomic_dir
from kohaku_delta.errors import UserError
from kohaku_delta.hub import file_download, progress, verified_files
from kohaku_delta.hub.verified_files import VerifiedFile
from kohaku_delta.printing import log_above_bar
from kohaku_delta.provenance import import_closure
from kohaku_delta.strict_model import PartialModel, StrictModel

LONGEST = 1 << 20  # bytes of a line; a post with a thousand tags has 30 KB
BATCH = 1 << 14  # posts
FIRST = 1000  # posts that are read to recognise the file
MAX_TAGS = 1 << 23  # different tags, which are held in memory; Danbooru had about a million
MAX_NOTE = 1 << 12  # bytes
DATABASE, NOTE = "danbooru2023.db", "made.json"
RATINGS = {None: None, "g": 0, "s": 1, "q": 2, "e": 3}
CLASSES = ("general", "artist", "character", "copyright", "meta")  # in the order of their numbers in tag.type
LAYOUT = (
    "docs/download.md describes the file (“The originals of the model card”). Download it again and compare its "
    "sha256, or name another one in params.yaml (download.inputs.posts)."
)

TABLES = """
CREATE TABLE post (id INTEGER PRIMARY KEY, created_at TEXT, rating INTEGER, fav_count INTEGER, file_ext TEXT, md5 TEXT,
    file_url TEXT, is_deleted INTEGER, is_banned INTEGER, first_relation INTEGER);
CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT, type INTEGER);
CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER);
"""
SETTINGS = ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", "PRAGMA cache_size = -65536")
INSERT_POSTS = f"INSERT OR REPLACE INTO post VALUES ({', '.join('?' * 10)})"
# The relations of lines whose post a later line replaced
DELETE_REPLACED = """DELETE FROM posttagrelation
    WHERE id < (SELECT first_relation FROM post WHERE post.id = posttagrelation.post_id)"""


class PostRecord(PartialModel):
    """What is read of a line; tag_string_…: names separated by spaces. Posts that only gold accounts see have no md5
    and no file_url.
    """

    id: Annotated[int, Field(gt=0, lt=1 << 31)]
    created_at: str | None
    rating: Literal["g", "s", "q", "e"] | None
    fav_count: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None
    file_ext: str | None
    is_deleted: bool | None
    is_banned: bool | None
    tag_string_general: str | None
    tag_string_artist: str | None
    tag_string_character: str | None
    tag_string_copyright: str | None
    tag_string_meta: str | None
    md5: str | None = None
    file_url: str | None = None


RECORD = TypeAdapter(PostRecord)


class Note(StrictModel):
    """What a converted database was written by, and its sha256."""

    by: str
    sha256: str


def converted_database(source: Path, sha256: str, mirror: Path) -> tuple[Path, VerifiedFile]:
    """The database made from a posts.json of this sha256, its own sha256 and stamp; written if it is not in the mirror
    yet. Raises UserError for a line that is no post.
    """
    folder = mirror / "converted" / sha256
    if found := _kept(folder):
        return folder / DATABASE, found
    file_download.require_free_space(mirror, source.stat().st_size)  # measured: 0.3 of it
    with atomic_dir(folder) as new:
        with progress.progress_bar("convert posts", source.stat().st_size) as advance:
            write_database(source, new / DATABASE, advance)
        found = verified_files.hash_with_stamp(new / DATABASE)
        (new / NOTE).write_text(Note(by=_writer(), sha256=found.sha256).model_dump_json() + "\n", encoding="utf-8")
    return folder / DATABASE, found


def _kept(folder: Path) -> VerifiedFile | None:
    try:
        note = strict_model.read_json(folder / NOTE, Note, MAX_NOTE)
        if note.by != _writer():
            return None
        found = verified_files.hash_with_stamp(folder / DATABASE)
    except (UserError, OSError):
        return None
    return found if found.sha256 == note.sha256 else None


def _writer() -> str:
    """What decides the bytes of a converted database."""
    code = import_closure.file_digest(Path(__file__).name, Path(__file__).read_bytes())
    return json.dumps({"code": code, "adbc_driver_sqlite": adbc_driver_sqlite.__version__}, sort_keys=True)


def read_posts(source: Path, advance: Callable[[int], object] = lambda count: None) -> Iterator[PostRecord]:
    """The posts of a posts.json, line by line; empty lines are skipped. Raises UserError for a line that is none."""
    validate = RECORD.validator.validate_json
    with open(source, "rb") as file:
        for number in count(1):
            line = file.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise UserError(
                    f"{source}, line {number:,}: it has more than {LONGEST:,} bytes, the limit for a post. The file "
                    f"must be JSON Lines: one post per line. {LAYOUT}"
                )
            advance(len(line))
            if not line.isspace():
                try:
                    yield validate(line)
                except ValidationError:
                    strict_model.parse_json(f"{source}, line {number:,}", PostRecord, line, LAYOUT)


def check_beginning(source: Path) -> None:
    """Raises UserError if one of the first lines is no post, or if there is none."""
    if not list(islice(read_posts(source), FIRST)):
        raise UserError(f"{source} has no post. {LAYOUT}")


def write_database(
    source: Path, target: Path, advance: Callable[[int], object] = lambda count: None
) -> tuple[int, int]:
    """Converts a posts.json; returns how many posts and tag pairs the database has."""
    next_id = count(1).__next__
    tag_ids: list[dict[str, int]] = [
        defaultdict(next_id) for _ in CLASSES
    ]  # one sequence of ids, in the order of first occurrence
    lines = pairs = general = 0
    try:
        with (
            adbc_driver_sqlite.dbapi.connect(target.resolve().as_uri(), autocommit=True) as connection,
            connection.cursor() as cursor,
        ):
            for statement in (*SETTINGS, *filter(str.strip, TABLES.split(";")), "BEGIN"):
                cursor.execute(statement)
            records = read_posts(source, advance)
            while posts := list(islice(records, BATCH)):
                lines += len(posts)
                general += sum(post.rating == "g" for post in posts)
                tags, ends = _tags_of(posts, tag_ids)
                if sum(map(len, tag_ids)) > MAX_TAGS:
                    raise UserError(f"{source} has more than {MAX_TAGS:,} different tags. {LAYOUT}")
                ids = np.array([post.id for post in posts], np.int64)
                cursor.executemany(INSERT_POSTS, _post_rows(posts, ids, pairs + 1 + np.r_[0, ends[:-1]]))
                relations = {
                    "id": np.arange(pairs + 1, pairs + 1 + len(tags)),
                    "post_id": np.repeat(ids, np.diff(ends, prepend=0)),
                    "tag_id": np.array(tags, np.int64),
                }
                cursor.adbc_ingest("posttagrelation", pa.table(relations), mode="append")
                pairs += len(tags)
            cursor.adbc_ingest("tag", _tag_rows(tag_ids), mode="append")
            posts_written = _value(cursor, "SELECT count(*) FROM post")
            if lines > posts_written:
                cursor.execute(DELETE_REPLACED)
                pairs = _value(cursor, "SELECT count(*) FROM posttagrelation")
            cursor.execute("COMMIT")
    except (adbc_driver_manager.Error, OSError) as error:
        raise UserError(
            f"{source} cannot be converted into {target}: {' '.join(str(error).split())}. Is the disk full?"
        ) from None
    if not lines:
        raise UserError(f"{source} has no post. {LAYOUT}")
    if lines > posts_written:
        log_above_bar(f"{source}: {lines - posts_written:,} lines are of posts that a later line has again")
    if not general:
        log_above_bar(
            f"{source}: no post has the rating g (general). In files from before 2022 the letter s means safe, not "
            "sensitive; such a file would be misread."
        )
    return posts_written, pairs


def _tags_of(posts: list[PostRecord], tag_ids: list[dict[str, int]]) -> tuple[list[int], np.ndarray]:
    """The ids of the tags of these posts, post by post and class by class, and where each post's end (int64)."""
    tags: list[int] = []
    ends = []
    for post in posts:
        texts = (
            post.tag_string_general,
            post.tag_string_artist,
            post.tag_string_character,
            post.tag_string_copyright,
            post.tag_string_meta,
        )
        for ids, text in zip(tag_ids, texts, strict=True):
            if text:
                tags += [ids[name] for name in text.split(" ") if name]
        ends.append(len(tags))
    return tags, np.array(ends, np.int64)


def _post_rows(posts: list[PostRecord], ids: np.ndarray, first_relation: np.ndarray) -> pa.RecordBatch:
    """The rows of table post, columns in its order."""
    columns = {
        "id": pa.array(ids),
        "created_at": pa.array([post.created_at for post in posts], pa.string()),
        "rating": pa.array([RATINGS[post.rating] for post in posts], pa.int64()),
        "fav_count": pa.array([post.fav_count for post in posts], pa.int64()),
        "file_ext": pa.array([post.file_ext for post in posts], pa.string()),
        "md5": pa.array([post.md5 for post in posts], pa.string()),
        "file_url": pa.array([post.file_url for post in posts], pa.string()),
        "is_deleted": pa.array([post.is_deleted for post in posts], pa.bool_()).cast(pa.int64()),
        "is_banned": pa.array([post.is_banned for post in posts], pa.bool_()).cast(pa.int64()),
        "first_relation": pa.array(first_relation),
    }
    return pa.record_batch(columns)


def _tag_rows(tag_ids: list[dict[str, int]]) -> pa.Table:
    """The rows of table tag, by id."""
    numbers = chain.from_iterable(ids.values() for ids in tag_ids)
    names = chain.from_iterable(ids.keys() for ids in tag_ids)
    types = chain.from_iterable(repeat(kind, len(ids)) for kind, ids in enumerate(tag_ids))
    columns = [pa.array(numbers, pa.int64()), pa.array(names, pa.string()), pa.array(types, pa.int64())]
    return pa.table(columns, names=["id", "name", "type"]).sort_by("id")


def _value(cursor, query: str) -> int:
    cursor.execute(query)
    return cursor.fetchone()[0]
