"""Guarantee: a database that passes has the tables, columns and numbers that the stages read as danbooru2023.db has
them; another one is refused by table and column.

`check` reads the schema, the types of all tags, and the first and last rows of each table: a second, before the hours
that filter and training take. Single odd rows are no fault: the release's tool dropped such posts, and the filter stage
counts them. docs/recipe.md has the layout for a database of one's own.
"""

import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta.danbooru.created_at import USUAL, years
from kohaku_delta.danbooru.database import Database
from kohaku_delta.errors import UserError

ROWS = 1000  # at either end of a table
TYPES = "0 general, 1 artist, 2 character, 3 copyright, 4 meta"
DANBOORU_TYPES = "0 general, 1 artist, 3 copyright, 4 character, 5 meta"
CHARACTER, META, DANBOORU_META = 2, 4, 5
# frequent meta tags of Danbooru, by their names there
META_NAMES = (
    "highres",
    "absurdres",
    "lowres",
    "commentary",
    "commentary_request",
    "translated",
    "translation_request",
    "bad_id",
    "bad_pixiv_id",
    "md5_mismatch",
)
COLUMNS = {
    "post": ("id", "created_at", "md5", "file_ext", "file_url", "rating", "fav_count", "is_deleted", "is_banned"),
    "tag": ("id", "name", "type"),
    "posttagrelation": ("id", "post_id", "tag_id"),
}
# table.column → what its numbers mean
WHOLE = {
    "post.id": "the post's id", "post.rating": "0 general, 1 sensitive, 2 questionable, 3 explicit", "post.fav_count": "how many favourites", "post.is_deleted": "0 or 1",
    "post.is_banned": "0 or 1", "tag.id": "the tag's id", "tag.type": TYPES, "posttagrelation.id": "the order of tags in a caption",
    "posttagrelation.post_id": "post.id", "posttagrelation.tag_id": "tag.id",
}  # fmt: skip
REMEDY = "Mend the database (docs/recipe.md has the layout), or name the one that was meant in params.yaml (download.inputs.database)."


def check_schema(database: Database) -> list[str]:
    """Refuses a database that the stages would misread; returns sentences on what they may misread."""
    for table, columns in COLUMNS.items():
        database.require_columns(table, *columns)
    for table in COLUMNS:
        if not _single_value(database, f"SELECT EXISTS (SELECT 1 FROM {table})"):
            raise UserError(f"The database {database.path} has no row in its table {table}. {REMEDY}")
    for place, meaning in WHOLE.items():
        _require_integers(database, *place.split("."), meaning)
    _require_dates(database)
    return _require_types(database)


def _single_value(database: Database, query: str):
    """The only cell of a query's only row."""
    return next(database.stream(query)).column(0)[0].as_py()


def _first_and_last(table: str, column: str) -> str:
    """A subquery: the column in the first and last rows."""
    both = (
        f"SELECT * FROM (SELECT {column} AS cell FROM {table} ORDER BY id {way} LIMIT {ROWS})"
        for way in ("ASC", "DESC")
    )
    return f"({' UNION ALL '.join(both)})"


def _require_integers(database: Database, table: str, column: str, meaning: str) -> None:
    """Refuses a column with cells at either end of the table none of which is a number: letters for ratings, or a table
    of texts.
    """
    numbers = _single_value(
        database, f"SELECT count(*) FROM {_first_and_last(table, column)} WHERE typeof(cell) IN ('integer', 'real')"
    )
    other = (
        None
        if numbers
        else _single_value(
            database,
            f"SELECT CAST(max(CAST(cell AS TEXT)) AS TEXT) FROM {_first_and_last(table, column)} WHERE cell IS NOT NULL",
        )
    )
    if other is not None:
        says = f"{table}.{column} holds the text {other[:40]!r}; a whole number belongs there ({meaning})"
        raise UserError(f"The database {database.path} is not laid out as danbooru2023.db: {says}. {REMEDY}")


def _require_dates(database: Database) -> None:
    """Refuses a table of posts whose dates can all not be read: each post would get the date tag of
    caption.before_first_year.
    """
    query = f"SELECT CAST(cell AS TEXT) AS cell, typeof(cell) = 'text' AS text FROM {_first_and_last('post', 'created_at')} WHERE cell IS NOT NULL"
    batches = [batch for batch in database.stream(query) if batch.num_rows]
    if not batches:
        return
    cells = pa.concat_arrays([batch.column(0).cast(pa.binary()) for batch in batches])
    texts = pa.concat_arrays([batch.column(1).cast(pa.int64()) for batch in batches])
    readable = cells.filter(pc.equal(texts, 1))
    if not len(readable) or not years(readable).any():
        says = f"post.created_at holds {cells[0].as_py().decode('utf-8', 'replace')[:40]!r}, in which no year can be read; a text like {USUAL!r} belongs there"
        raise UserError(f"The database {database.path} is not laid out as danbooru2023.db: {says}. {REMEDY}")


def _require_types(database: Database) -> list[str]:
    """Refuses Danbooru's own numbers of tag types; says so if that cannot be told."""
    query = (
        "SELECT CAST(type AS INTEGER) AS type, count(*) AS tags FROM tag WHERE typeof(type) = 'integer' GROUP BY type"
    )
    counts = {row["type"]: row["tags"] for batch in database.stream(query) for row in batch.to_pylist()}
    names = ", ".join(f"'{name}'" for name in META_NAMES)
    known = {
        kind: _single_value(database, f"SELECT count(*) FROM tag WHERE type = {kind} AND name IN ({names})")
        for kind in (META, DANBOORU_META)
    }
    if DANBOORU_META in counts and (CHARACTER not in counts or known[DANBOORU_META]):
        mend = "UPDATE tag SET type = CASE type WHEN 4 THEN 2 WHEN 5 THEN 4 ELSE type END"
        says = f"tag.type has Danbooru's own numbers ({DANBOORU_TYPES}); the stages read those of danbooru2023.db ({TYPES})"
        raise UserError(
            f"The database {database.path} would be misread: {says}, so characters would count as meta tags. Renumber them in a copy: {mend};"
        )
    if META in counts and CHARACTER not in counts and not known[META]:
        example = _single_value(database, f"SELECT CAST(min(name) AS TEXT) FROM tag WHERE type = {META}")
        return [
            f"{database.path} has no tag of type 2 (character) and {counts[META]:,} of type 4 (meta), {example} for one. If these are characters, type 4 must become 2 there ({TYPES})."
        ]
    return []
