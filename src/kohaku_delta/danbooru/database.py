"""Invariant: the database is read, never written; columns by name, only those needed, rows in one total order.

SQLite reaches Arrow in C (ADBC), as batches, so that 250 million rows cost seconds and no memory. A table is cut into
spans of its key, which several connections read at once; batches come in the order of the key all the same. Both schema
variants of danbooru2023 are read (with and without tag_list and the tag counts). The largest table, posttagrelation, is
cut out of the file's pages where it is as plain as pages.py knows it, under SQLite's lock; SQLite reads the rest. Every
expression here gives one type whatever a cell holds, because SQLite types cells and Arrow types columns.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import adbc_driver_manager
import adbc_driver_sqlite.dbapi
import numpy as np
import pyarrow as pa

from kohaku_delta.danbooru import sqlite_pages
from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map

BATCH = 1 << 16
SPAN = 1 << 19  # of a key's values, read as one piece
SPANS = 1 << 14  # more of them than this: the key is no row number, and one connection reads all
LEAVES = 512  # pages of pairs, read as one piece
ARRAY = (1 << 25) - (1 << 16)  # bytes; glibc adapts to pieces up to 32 MiB
MAGIC = b"SQLite format 3\0"

# A tag's type 0 … 4, -1 none, -2 unknown; negative types count from the end of the five, as they did in the release's
# tool (a Python list).
TYPE = "CASE WHEN type IS NULL THEN -1 WHEN typeof(type) != 'integer' OR type NOT BETWEEN -5 AND 4 THEN -2 WHEN type < 0 THEN type + 5 ELSE type END"

DAMAGED = "is damaged or truncated. Download it again and compare its sha256 with the pin."

# What SQLite says, and what a person does about it; the first line that fits is told.
CAUSES = (
    (
        "locked",
        "is locked by another program. Close that program, or wait until it has finished, and run the stage again.",
    ),
    ("not a database", "is not an SQLite database. Check the path, or download it again."),
    ("malformed", DAMAGED),
    (
        "disk I/O",
        "is damaged or truncated, or its disk cannot be read. Download it again and compare its sha256 with the pin.",
    ),
    ("Type mismatch", "holds a text where a whole number belongs (an id or a type). Is it danbooru2023.db, and whole?"),
)


# Freed untouched, once: from then on glibc keeps freed arrays up to this size for the next ones. Else each batch's
# arrays would be given back to the system and had again as fresh pages, whose clearing costs as much as the work on
# them.
np.empty(ARRAY, np.uint8)


class Database:
    """danbooru2023.db, or another SQLite file with its tables post, tag and posttagrelation."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"The database {self.path} is not there. Name it by --database, or run the download stage.")
        with open(self.path, "rb") as file:
            start = file.read(100)
        if not start.startswith(MAGIC):
            what = "is empty" if not start else "is not an SQLite database"
            raise UserError(f"The database {self.path} {what}. Check the path, or download it again.")
        page, pages = int.from_bytes(start[16:18], "big"), int.from_bytes(start[28:32], "big")
        size, whole = self.path.stat().st_size, (65536 if page == 1 else page) * pages
        if start[24:28] == start[92:96] and size < whole:  # the header's count of pages is the last writer's own
            raise UserError(
                f"The database {self.path} is truncated: it has {size:,} of {whole:,} bytes. Download it again and compare its sha256 with the pin."
            )

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, in batches of at most 65,536."""
        with self._connection() as connection:
            yield from self._rows(connection, query)

    def _connection(self):
        with self._translate_errors():
            return adbc_driver_sqlite.dbapi.connect(self.path.resolve().as_uri() + "?mode=ro")

    def _rows(self, connection, query: str) -> Iterator[pa.RecordBatch]:
        with self._translate_errors(), connection.cursor() as cursor:
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": BATCH})
            cursor.execute(query)
            yield from cursor.fetch_record_batch()

    def require_columns(self, table: str, *columns: str) -> None:
        """Refuses a database that lacks the table or one of its columns, and names all that are missing."""
        with self._translate_errors():
            names = [
                name
                for batch in self.stream(f"SELECT name FROM pragma_table_info('{table}')")
                for name in batch.column(0).to_pylist()
            ]
        if not names:
            raise UserError(f"The database {self.path} has no table {table}. Is it danbooru2023.db, and whole?")
        missing = [column for column in columns if column not in {name.lower() for name in names}]
        if missing:
            raise UserError(
                f"The database {self.path} has no column {', '.join(missing)} in its table {table}; it has {', '.join(names)}. Is it laid out as danbooru2023.db (docs/recipe.md)?"
            )

    def iter_key_ranges(self, table: str, columns: str, work: Callable = list) -> Iterator:
        """work(batches) of each span of a table, by ascending id: `columns` is what is selected, `batches` an iterator
        of record batches.

        `work` runs in several threads at once.
        """
        key = f"(SELECT group_concat(upper(type) || pk) FROM pragma_table_info('{table}') WHERE lower(name) = 'id')"
        ends = (f"(SELECT CAST({end}(id) AS INTEGER) FROM {table})" for end in ("min", "max"))
        key, low, high = next(batch.to_pydict().values() for batch in self.stream(f"SELECT {key}, {', '.join(ends)}"))
        key, low, high = key[0], low[0], high[0]
        if low is None:
            return
        query = f"SELECT {columns} FROM {table} WHERE id IS NOT NULL ORDER BY id"
        if key != "INTEGER1" or (high - low) // SPAN > SPANS:
            yield work(self.stream(query))
            return
        starts = range(low, high + 1, SPAN)
        idle = []  # connections that no thread uses just now; opening one reads the schema

        def read(start: int):
            connection = idle.pop() if idle else stack.enter_context(self._connection())
            done = work(
                self._rows(
                    connection, query.replace("id IS NOT NULL", f"id BETWEEN {start} AND {min(start + SPAN - 1, high)}")
                )
            )
            idle.append(connection)
            return done

        with ExitStack() as stack:
            yield from ordered_map(read, starts)

    def post_ids(self) -> np.ndarray:
        """Every post's id, int64, ascending: the population that the selection indexes."""
        self.require_columns("post", "id")
        ids = _concat([batch.column(0) for batches in self.iter_key_ranges("post", "id") for batch in batches])
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
        named = ", ".join(["id", *(f"{expression} AS {name}" for name, expression in expressions.items())])
        for done in self.iter_key_ranges(
            "post", named, lambda batches: [work(batch) for batch in batches if batch.num_rows]
        ):
            yield from done

    def tags(self) -> pa.Table:
        """Every tag: id int64 ascending, name string ("" where the database has none), named bool, type int64 (TYPE)."""
        self.require_columns("tag", "id", "name", "type")
        query = f"SELECT id, CAST(coalesce(name, '') AS TEXT) AS name, name IS NOT NULL AS named, {TYPE} AS type FROM tag ORDER BY id"
        schema = pa.schema([("id", pa.int64()), ("name", pa.string()), ("named", pa.int64()), ("type", pa.int64())])
        table = pa.Table.from_batches([batch.cast(schema) for batch in self.stream(query)], schema)
        try:
            table.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"The database {self.path} holds a tag name that is not UTF-8 ({error}). Download it again."
            ) from None
        return table.set_column(2, "named", table["named"].cast(pa.bool_())).combine_chunks()

    def broken_tags(self) -> np.ndarray:
        """Ids of the tags that have a type and no name, or a type that is not known (int64)."""
        self.require_columns("tag", "id", "name", "type")
        return _concat(
            [
                batch.column(0)
                for batch in self.stream(f"SELECT id FROM tag WHERE type IS NOT NULL AND (name IS NULL OR {TYPE} = -2)")
            ]
        )

    def relations(self, work: Callable) -> Iterator:
        """work(pairs) of every pair in the order of posttagrelation.id, which is the order of tags in a caption; `work`
        runs in threads.

        `pairs` is int64: post id << 32 | tag id. One column costs SQLite and Arrow a quarter less than two.
        """
        self.require_columns("posttagrelation", "id", "post_id", "tag_id")
        pair = "post_id << 32 | tag_id"

        def each(batches: Iterable[pa.RecordBatch]) -> list:
            return [work(batch.column(0).drop_null().to_numpy()) for batch in batches]

        with self._leaves("posttagrelation", ["id", "post_id", "tag_id"]) as table:
            if table is None:
                for done in self.iter_key_ranges("posttagrelation", pair, each):
                    yield from done
                return

            def read(start: int) -> list:
                stop = min(start + LEAVES, len(table.page))
                found = sqlite_pages.read_pairs(table, start, stop)
                if found is not None:
                    return [work(found)]
                above, upto = (
                    (f"id > {table.key[start - 1]}" if start else "true"),
                    ("true" if stop == len(table.page) else f"id <= {table.key[stop - 1]}"),
                )
                batches = list(self.stream(f"SELECT {pair} FROM posttagrelation WHERE {above} AND {upto} ORDER BY id"))
                if sum(batch.num_rows for batch in batches) != sqlite_pages.count_rows(table, start, stop):
                    raise UserError(f"The database {self.path} {DAMAGED}")
                return each(batches)

            for done in ordered_map(read, range(0, len(table.page), LEAVES)):
                yield from done

    @contextmanager
    def _leaves(self, table: str, columns: list[str]) -> Iterator[sqlite_pages.LeafPages | None]:
        """The pages of a table of exactly these columns, the first of which is its rowid. The connection's transaction
        keeps writers out meanwhile.
        """
        facts = f"""SELECT (SELECT group_concat(lower(name) || hidden || pk) FROM pragma_table_xinfo('{table}')) AS columns,
            (SELECT upper(type) FROM pragma_table_info('{table}') WHERE pk = 1) = 'INTEGER'
                AND NOT EXISTS (SELECT 1 FROM pragma_index_list('{table}') WHERE origin = 'pk') AS keyed,
            (SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND lower(name) = '{table}') AS root"""
        with self._connection() as connection:
            with self._translate_errors():
                said = list(self._rows(connection, facts))[0].to_pylist()[0]
            if (
                said["columns"] != ",".join(f"{name}0{int(not place)}" for place, name in enumerate(columns))
                or said["keyed"] != 1
                or type(said["root"]) is not int
            ):
                yield None
                return
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                yield sqlite_pages.list_leaf_pages(descriptor, said["root"])
            finally:
                connection.close()  # first: closing the file takes this process's locks away
                os.close(descriptor)

    def posts_of(self, tags: np.ndarray) -> np.ndarray:
        """Ids of the posts that have any of these few tags (int64, repeats possible)."""
        self.require_columns("posttagrelation", "id", "post_id", "tag_id")
        parts = [tags[start : start + 500].tolist() for start in range(0, len(tags), 500)]
        queries = [
            f"SELECT post_id FROM posttagrelation WHERE post_id IS NOT NULL AND tag_id IN ({', '.join(map(str, part))})"
            for part in parts
        ]
        return _concat([batch.column(0) for query in queries for batch in self.stream(query)])

    def last_relation(self) -> int:
        """The largest posttagrelation.id: about how many rows there are, known at once."""
        self.require_columns("posttagrelation", "id")
        return int(
            _concat([batch.column(0) for batch in self.stream("SELECT coalesce(max(id), 0) FROM posttagrelation")])[0]
        )

    @contextmanager
    def _translate_errors(self):
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
    values = np.sort(np.asarray(values, np.int64))
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def positions_of(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where values (in about ascending order, else it takes long) stand in an ascending list of distinct ids: int32, -1
    for one that is not in it.
    """
    if not len(ids):
        return np.full(len(values), -1, np.int32)
    places = np.minimum(np.searchsorted(ids, values), len(ids) - 1).astype(np.int32)
    return np.where(ids[places] == values, places, np.int32(-1))


class IdLookup:
    """The same for many values in any order: a table of all places, where the ids lie close enough."""

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
        if inside.all():
            return self.places[values]
        return np.where(inside, self.places[np.where(inside, values, 0)], np.int32(-1))


def _concat(arrays: list[pa.Array]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(array.to_numpy() for array in arrays)])
