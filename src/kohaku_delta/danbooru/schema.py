"""Checks that a database has the tables, columns and numbers that the stages expect of danbooru2023.db.

`check_schema` reads the schema, the types of all tags, and the first and last rows of each table. That takes a second,
and comes before the hours that filter and training take. Single odd rows are no error: the release's tool dropped such
posts, and the filter stage counts them. docs/recipe.md has the layout for a database of your own.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta.danbooru.created_at import USUAL, years
from kohaku_delta.danbooru.database import Database
from kohaku_delta.errors import UserError

ROWS = 1000  # at either end of a table
TYPES = "0 general, 1 artist, 2 character, 3 copyright, 4 meta"
DANBOORU_TYPES = "0 general, 1 artist, 3 copyright, 4 character, 5 meta"
CHARACTER, META, DANBOORU_META = 2, 4, 5
# frequent meta tags of Danbooru
META_NAMES = (
    *("highres", "absurdres", "lowres", "commentary", "commentary_request", "translated", "translation_request"),
    *("bad_id", "bad_pixiv_id", "md5_mismatch"),
)
COLUMNS = {
    "post": ("id", "created_at", "md5", "file_ext", "file_url", "rating", "fav_count", "is_deleted", "is_banned"),
    "tag": ("id", "name", "type"),
    "posttagrelation": ("id", "post_id", "tag_id"),
}
# table.column → the meaning of its numbers
NUMBERS = {
    "post.id": "the post's id",
    "post.rating": "0 general, 1 sensitive, 2 questionable, 3 explicit",
    "post.fav_count": "how many favourites",
    "post.is_deleted": "0 or 1",
    "post.is_banned": "0 or 1",
    "tag.id": "the tag's id",
    "tag.type": TYPES,
    "posttagrelation.id": "the order of tags in a caption",
    "posttagrelation.post_id": "post.id",
    "posttagrelation.tag_id": "tag.id",
}


def check_schema(database: Database) -> list[str]:
    """Raises UserError for a database that the stages would misread; returns sentences about what they may misread."""
    for table, columns in COLUMNS.items():
        database.require_columns(table, *columns)
    for table in COLUMNS:
        if not database.value(f"SELECT EXISTS (SELECT 1 FROM {table})"):
            raise _wrong_layout(database, f"its table {table} has no row")
    for place, meaning in NUMBERS.items():
        table, column = place.split(".")
        _require_numbers(database, table, column, meaning)
    for table in ("post", "tag"):
        ends = [database.value(f"SELECT CAST({end}(id) AS INTEGER) FROM {table}") for end in ("min", "max")]
        database.require_small_ids(table, np.array(ends, np.int64))
    _require_dates(database)
    return _check_types(database)


def _wrong_layout(database: Database, problem: str) -> UserError:
    return UserError(
        f"The database {database.path} is not laid out like danbooru2023.db: {problem}. Correct it (docs/recipe.md "
        "has the layout), or name another one in params.yaml (download.inputs.database)."
    )


def _first_and_last(table: str, column: str) -> str:
    """A subquery: the column in the first and last rows."""
    both = (
        f"SELECT * FROM (SELECT {column} AS cell FROM {table} ORDER BY id {way} LIMIT {ROWS})"
        for way in ("ASC", "DESC")
    )
    return f"({' UNION ALL '.join(both)})"


def _require_numbers(database: Database, table: str, column: str, meaning: str) -> None:
    """Raises UserError if a column holds no number at either end of the table, but something else: letters for ratings,
    or a table of texts.
    """
    cells = _first_and_last(table, column)
    if database.value(f"SELECT count(*) FROM {cells} WHERE typeof(cell) IN ('integer', 'real')"):
        return
    text = database.value(f"SELECT CAST(max(CAST(cell AS TEXT)) AS TEXT) FROM {cells} WHERE cell IS NOT NULL")
    if text is not None:
        raise _wrong_layout(
            database, f"{table}.{column} holds the text {text[:40]!r}; a whole number belongs there ({meaning})"
        )


def _require_dates(database: Database) -> None:
    """Raises UserError if no date of the posts can be read: each post would get the tag caption.before_first_year."""
    query = f"""SELECT CAST(cell AS TEXT) AS cell, typeof(cell) = 'text' AS text
        FROM {_first_and_last("post", "created_at")} WHERE cell IS NOT NULL"""
    batches = [batch for batch in database.stream(query) if batch.num_rows]
    if not batches:
        return
    cells = pa.concat_arrays([batch.column(0).cast(pa.binary()) for batch in batches])
    is_text = pa.concat_arrays([batch.column(1).cast(pa.int64()) for batch in batches])
    texts = cells.filter(pc.equal(is_text, 1))
    if not len(texts) or not years(texts).any():
        example = cells[0].as_py().decode("utf-8", "replace")[:40]
        raise _wrong_layout(
            database,
            f"post.created_at holds {example!r}, in which no year can be read; a text like {USUAL!r} belongs there",
        )


def _check_types(database: Database) -> list[str]:
    """Raises UserError for Danbooru's own numbers of tag types; returns a sentence if they cannot be recognised."""
    query = (
        "SELECT CAST(type AS INTEGER) AS type, count(*) AS tags FROM tag WHERE typeof(type) = 'integer' GROUP BY type"
    )
    counts = {row["type"]: row["tags"] for batch in database.stream(query) for row in batch.to_pylist()}
    names = ", ".join(f"'{name}'" for name in META_NAMES)
    known = {
        kind: database.value(f"SELECT count(*) FROM tag WHERE type = {kind} AND name IN ({names})")
        for kind in (META, DANBOORU_META)
    }
    if DANBOORU_META in counts and (CHARACTER not in counts or known[DANBOORU_META]):
        raise UserError(
            f"The database {database.path} would be misread: tag.type has Danbooru's own numbers ({DANBOORU_TYPES}); "
            f"the stages read those of danbooru2023.db ({TYPES}), so characters would count as meta tags. "
            "Renumber them in a copy: UPDATE tag SET type = CASE type WHEN 4 THEN 2 WHEN 5 THEN 4 ELSE type END;"
        )
    if META in counts and CHARACTER not in counts and not known[META]:
        example = database.value(f"SELECT CAST(min(name) AS TEXT) FROM tag WHERE type = {META}")
        return [
            f"{database.path} has no tag of type 2 (character) and {counts[META]:,} of type 4 (meta), for example "
            f"{example}. If these are characters, type 4 must become 2 ({TYPES})."
        ]
    return []
