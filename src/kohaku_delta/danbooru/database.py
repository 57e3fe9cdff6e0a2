"""Reads danbooru2023.db: columns by name, only those needed, rows in one total order. Nothing is ever written to it.

SQLite's rows reach Arrow in C (ADBC) as record batches, so 250 million rows never become Python objects and never lie
in memory together. A table is read in ranges of its key, over several connections at once; the batches still come in
the order of the key. Both schema variants of danbooru2023 are read (with and without tag_list and the tag counts).
SQLite types cells and Arrow types columns, so every expression here has one type whatever a cell holds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import adbc_driver_manager
import adbc_driver_sqlite.dbapi
import numpy as np
import pyarrow as pa

from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map

BATCH = 1 << 16  # rows of a record batch
SPAN = 1 << 19  # width of a key range
SPANS = 1 << 14  # with more ranges than this the ids are too sparse for ranges, and one connection reads everything
MAGIC = b"SQLite format 3\0"
WAL = 2  # in bytes 18 and 19 of the header: changes are first written to a file beside, *-wal
KEYS = ("id", "post_id", "tag_id")

# A tag's type 0 … 4; -1 for NULL, -2 for an unknown type. Negative types count from the end of the five, as they did in
# the release's tool (a Python list).
TYPE = """CASE WHEN type IS NULL THEN -1 WHEN typeof(type) != 'integer' OR type NOT BETWEEN -5 AND 4 THEN -2
    WHEN type < 0 THEN type + 5 ELSE type END"""

POST_IDS, TAG_IDS = range(-(1 << 31), 1 << 31), range(1 << 32)  # that have room in one int64 together
PAIR = f"""CASE WHEN post_id BETWEEN {POST_IDS.start} AND {POST_IDS.stop - 1} AND post_id = post_id | 0
    AND tag_id BETWEEN {TAG_IDS.start} AND {TAG_IDS.stop - 1} AND tag_id = tag_id | 0
    THEN post_id << 32 | tag_id END"""

MERGE_CHANGES = (
    'Close the program that writes to it, and run `sqlite3 FILE "PRAGMA journal_mode = DELETE"` on it, which writes '
    "them into it."
)
# (part of SQLite's message, what we say); the first match is used
CAUSES = (
    (
        "locked",
        "is locked by another program. Close that program, or wait until it has finished, and run the stage again.",
    ),
    ("not a database", "is not an SQLite database. Check the path, or download it again."),
    ("malformed", "is damaged or truncated. Download it again and compare its sha256 with the pin."),
    (
        "disk I/O",
        "is damaged or truncated, or its disk cannot be read. Download it again and compare its sha256 with the pin.",
    ),
    ("readonly database", f"is not complete: changes to it are in a file beside it (*-journal). {MERGE_CHANGES}"),
    (
        "unable to open",
        f"cannot be opened by SQLite. If a file *-journal is beside it, there are changes. {MERGE_CHANGES}",
    ),
    (
        "Type mismatch",
        "has text in a column of whole numbers (an id or a type). Check that it is the whole danbooru2023.db.",
    ),
)


class Database:
    """danbooru2023.db, or another SQLite file with its tables post, tag and posttagrelation."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"The database {self.path} does not exist. Set --database, or run the download stage.")
        with open(self.path, "rb") as file:
            header = file.read(100)
        if not header.startswith(MAGIC):
            what = "is not an SQLite database" if header else "is empty"
            raise UserError(f"The database {self.path} {what}. Check the path, or download it again.")
        page_size, pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
        size, expected = self.path.stat().st_size, (65536 if page_size == 1 else page_size) * pages
        if header[24:28] == header[92:96] and size < expected:  # equal: the last writer kept the count of pages
            raise UserError(
                f"The database {self.path} is truncated: it has {size:,} of {expected:,} bytes. "
                "Download it again and compare its sha256 with the pin."
            )
        changes = self.path.with_name(f"{self.path.name}-wal")
        if changes.is_file() and changes.stat().st_size:
            raise UserError(
                f"The database {self.path} is not complete: there are changes in {changes}. {MERGE_CHANGES} The "
                "sha256 is another one afterwards."
            )
        # SQLite would make *-wal and *-shm beside the file, which a folder that is only read does not allow
        self.mode = "immutable=1" if header[18:20] == bytes([WAL, WAL]) else "mode=ro"

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, in batches of at most 65,536."""
        with (
            self._translate_errors(),
            adbc_driver_sqlite.dbapi.connect(self.path.resolve().as_uri() + f"?{self.mode}") as connection,
            connection.cursor() as cursor,
        ):
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": BATCH})
            cursor.execute(query)
            yield from cursor.fetch_record_batch()

    def value(self, query: str):
        """The only cell of a query's only row."""
        cell = next(self.stream(query)).column(0)[0]
        return cell.as_buffer().to_pybytes().decode("utf-8", "replace") if _is_text(cell) else cell.as_py()

    def require_columns(self, table: str, *columns: str) -> None:
        """Raises UserError if the table or one of its columns does not exist (all that are missing are named), or if a
        key holds no whole number but something else, as after an import of a CSV.
        """
        names = [row for (row,) in _rows(self.stream(f"SELECT name FROM pragma_table_info('{table}')"))]
        if not names:
            raise UserError(
                f"The database {self.path} has no table {table}. Check that it is the whole danbooru2023.db."
            )
        missing = [column for column in columns if column not in {name.lower() for name in names}]
        if missing:
            raise UserError(
                f"The database {self.path} has no column {', '.join(missing)} in its table {table}; "
                f"it has {', '.join(names)}. docs/recipe.md has the layout of danbooru2023.db."
            )
        for column in (column for column in columns if column in KEYS):
            if not self.value(
                f"SELECT EXISTS (SELECT 1 FROM {table} WHERE typeof({column}) = 'integer') "
                f"OR NOT EXISTS (SELECT 1 FROM {table} WHERE {column} IS NOT NULL)"
            ):
                example = self.value(f"SELECT CAST(max(CAST({column} AS TEXT)) AS TEXT) FROM {table}")
                raise UserError(
                    f"The database {self.path} is not laid out like danbooru2023.db: {table}.{column} holds the text "
                    f"{example[:40]!r}; a whole number belongs there. Declare the column INTEGER (a CSV that is "
                    "imported into a new table gives texts); docs/recipe.md has the layout."
                )

    def map_batches(self, table: str, columns: str, work: Callable) -> Iterator:
        """work(batch) of record batches of `columns` (SQL) of a whole table, by ascending id. `work` runs in several
        threads at once.
        """
        is_rowid = f"""(SELECT count(*) FROM pragma_table_info('{table}')
            WHERE lower(name) = 'id' AND upper(type) = 'INTEGER' AND pk = 1)"""
        ends = (f"(SELECT CAST({end}(id) AS INTEGER) FROM {table})" for end in ("min", "max"))
        ((is_rowid, low, high),) = _rows(self.stream(f"SELECT {is_rowid}, {', '.join(ends)}"))
        if low is None:
            return

        def read(where: str) -> list:
            batches = self.stream(f"SELECT {columns} FROM {table} WHERE {where} ORDER BY id")
            return [work(batch) for batch in batches if batch.num_rows]

        wheres = ["id IS NOT NULL"]
        if is_rowid and (high - low) // SPAN <= SPANS:
            starts = range(low, high + 1, SPAN)
            wheres = [f"id BETWEEN {start} AND {min(start + SPAN - 1, high)}" for start in starts]
        for results in ordered_map(read, wheres):
            yield from results

    def post_ids(self) -> np.ndarray:
        """Every post's id, int64, ascending: the population that the selection draws from."""
        self.require_columns("post", "id")
        ids = _concat(self.map_batches("post", "id", lambda batch: batch.column(0)))
        if (ids[1:] == ids[:-1]).any():
            raise UserError(
                f"The database {self.path} holds a post id more than once; post.id must be its primary key."
            )
        return ids

    def posts(self, work: Callable, columns: list[str], **expressions: str) -> Iterator:
        """work(batch) of batches of (id, then the named SQL expressions over `columns`), ids ascending; `work` runs in
        threads.
        """
        self.require_columns("post", "id", *columns)
        named = ["id AS id", *(f"{expression} AS {name}" for name, expression in expressions.items())]
        return self.map_batches("post", ", ".join(named), work)

    def tags(self) -> pa.Table:
        """Every tag: id int64 ascending, name string ("" for NULL), named bool, type int64 (TYPE)."""
        self.require_columns("tag", "id", "name", "type")
        query = f"""SELECT id AS id, CAST(coalesce(name, '') AS TEXT) AS name, name IS NOT NULL AS named, {TYPE} AS type
            FROM tag ORDER BY id"""
        schema = pa.schema([("id", pa.int64()), ("name", pa.string()), ("named", pa.int64()), ("type", pa.int64())])
        table = pa.Table.from_batches([batch.cast(schema) for batch in self.stream(query)], schema)
        try:
            table.validate(full=True)
        except pa.ArrowInvalid:
            names = zip(table["id"].to_pylist(), table["name"].cast(pa.binary()).to_pylist(), strict=True)
            tag, name = next((tag, name) for tag, name in names if not _is_utf8(name))
            raise UserError(
                f"The database {self.path} holds a tag name that is not UTF-8: tag.id {tag}, {name[:100]!a}. Download "
                "it again, or correct the name in a copy."
            ) from None
        return table.set_column(2, "named", table["named"].cast(pa.bool_())).combine_chunks()

    def broken_tags(self) -> np.ndarray:
        """Ids of the tags that have a type but no name, or an unknown type (int64)."""
        self.require_columns("tag", "id", "name", "type")
        query = f"SELECT id FROM tag WHERE type IS NOT NULL AND (name IS NULL OR {TYPE} = -2)"
        return _concat(batch.column(0) for batch in self.stream(query))

    def relations(self, work: Callable) -> Iterator:
        """work(pairs) of batches of all pairs in the order of posttagrelation.id, which is the order of tags in a
        caption. `work` runs in threads.

        `pairs` is int64: post id << 32 | tag id. One column costs SQLite and Arrow a quarter less than two. Pairs in
        which one is no whole number, or has no room there, are left out: they name no post of POST_IDS, or no tag of
        TAG_IDS, and posts and tags outside of these are refused.
        """
        self.require_columns("posttagrelation", "id", "post_id", "tag_id")
        return self.map_batches("posttagrelation", PAIR, lambda batch: work(batch.column(0).drop_null().to_numpy()))

    def require_small_ids(self, table: str, ids: np.ndarray) -> None:
        """Raises UserError if any of these ids (int64) of the table "post" or "tag" has no room in a pair."""
        known = {"post": POST_IDS, "tag": TAG_IDS}[table]
        outside = ids[(ids < known.start) | (ids >= known.stop)]
        if len(outside):
            raise UserError(
                f"The database {self.path} has a row with {table}.id {outside[0]}; ids from {known.start} to "
                f"{known.stop - 1:,} can be read. Give such rows smaller ids in a copy, and in posttagrelation too."
            )

    def posts_of(self, tags: np.ndarray) -> np.ndarray:
        """Ids of the posts that have any of these few tags (int64, possibly repeated)."""
        self.require_columns("posttagrelation", "id", "post_id", "tag_id")
        parts = [", ".join(map(str, tags[start : start + 500].tolist())) for start in range(0, len(tags), 500)]
        query = "SELECT post_id FROM posttagrelation WHERE post_id IS NOT NULL AND tag_id IN"
        return _concat(batch.column(0) for part in parts for batch in self.stream(f"{query} ({part})"))

    def last_relation(self) -> int:
        """The largest posttagrelation.id: about how many rows there are, without counting them."""
        self.require_columns("posttagrelation", "id")
        return int(self.value("SELECT coalesce(max(id), 0) FROM posttagrelation"))

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (adbc_driver_manager.Error, pa.ArrowException, OSError, UnicodeDecodeError) as error:
            message = " ".join(str(error).split())
            for sign, sentence in CAUSES:
                if sign in message:
                    raise UserError(f"The database {self.path} {sentence}") from None
            raise UserError(f"The database {self.path} cannot be read: {message}") from None


def unique_sorted(values) -> np.ndarray:
    """Whole numbers as int64, ascending, each once."""
    return np.unique(np.asarray(values, np.int64))


def positions_of(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Position of each value in an ascending list of distinct ids (int32, -1 if it is not in it). Slow unless the
    values are roughly ascending.
    """
    if not len(ids):
        return np.full(len(values), -1, np.int32)
    places = np.minimum(np.searchsorted(ids, values), len(ids) - 1).astype(np.int32)
    return np.where(ids[places] == values, places, np.int32(-1))


class IdLookup:
    """`positions_of` for values in any order: a table of all positions, if the ids are dense enough for one."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids
        self.places = None
        if len(ids) and ids[0] >= 0 and ids[-1] < 256 * len(ids) + (1 << 16):
            self.places = np.full(int(ids[-1]) + 1, -1, np.int32)
            self.places[ids] = np.arange(len(ids), dtype=np.int32)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.places is None:
            return positions_of(self.ids, values)
        inside = (values >= 0) & (values < len(self.places))
        return np.where(inside, self.places[np.where(inside, values, 0)], np.int32(-1))


def _is_text(cell: pa.Scalar) -> bool:
    return pa.types.is_string(cell.type) and cell.is_valid


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _rows(batches: Iterator[pa.RecordBatch]) -> list[tuple]:
    """A small result as tuples."""
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


def _concat(arrays) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(array.to_numpy() for array in arrays)])
