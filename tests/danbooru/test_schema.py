"""A database that the stages would misread is refused by table and column, before hours are spent; what the release's
tool took is taken.
"""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from danbooru_factory import ARTIST, CHARACTER, COPYRIGHT, GENERAL, META, change, write_database
from kohaku_delta.danbooru import schema
from kohaku_delta.danbooru.database import Database
from kohaku_delta.errors import UserError
from kohaku_delta.preflight import host_checks, host_facts

ROOT = Path(__file__).resolve().parents[2]
TAGS = [
    (1, "long_hair", GENERAL),
    (2, "an_artist", ARTIST),
    (3, "hatsune_miku", CHARACTER),
    (4, "vocaloid", COPYRIGHT),
    (5, "highres", META),
]
PAIRS = [(post, tag) for post in range(1, 11) for tag in range(1, 6)]
DANBOORU = "UPDATE tag SET type = CASE type WHEN 2 THEN 4 WHEN 4 THEN 5 ELSE type END"


@pytest.fixture
def path(tmp_path):
    return write_database(tmp_path / "own.db", [{"id": post} for post in range(1, 11)], TAGS, PAIRS)


def as_text(path):
    """The same database as a program leaves it that imports a CSV: every column a text."""
    with sqlite3.connect(path) as connection:
        for table in ("post", "tag", "posttagrelation"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            connection.execute(f"CREATE TABLE copy ({', '.join(f'{column} TEXT' for column in columns)})")
            connection.execute(f"INSERT INTO copy SELECT * FROM {table}")
            connection.execute(f"DROP TABLE {table}")
            connection.execute(f"ALTER TABLE copy RENAME TO {table}")
    connection.close()
    return Database(path)


REFUSED = {
    "a column of the posts is missing": (("ALTER TABLE post RENAME COLUMN fav_count TO favs",),
    "has no column fav_count in its table post; it has id"),
    "a column that only filter reads is missing": (("ALTER TABLE post RENAME COLUMN file_url TO url",),
    "has no column file_url in its table post"),
    "a table is missing": (("DROP TABLE posttagrelation",), "has no table posttagrelation"),
    "no post": (("DELETE FROM post",), "its table post has no row"),
    "no tag": (("DELETE FROM tag",), "its table tag has no row"),
    "no post has a tag": (("DELETE FROM posttagrelation",), "its table posttagrelation has no row"),
    "ratings are letters": (("UPDATE post SET rating = substr('gsqe', id % 4 + 1, 1)",),
    "post.rating holds the text 's'; a whole number belongs there .0 general, 1 sensitive"),
    "types are words": (("UPDATE tag SET type = 'general'",),
    "tag.type holds the text 'general'; a whole number belongs there .0 general, 1 artist, 2 character"),
    "pairs name tags by their names": (("UPDATE posttagrelation SET tag_id = 'long_hair'",),
    "posttagrelation.tag_id holds the text 'long_hair'"),
    "favourites are words": (("UPDATE post SET fav_count = 'many'",), "post.fav_count holds the text 'many'"),
    "dates cannot be read": (("UPDATE post SET created_at = 'no date'",),
    "post.created_at holds 'no date', in which no year"),
    "dates are numbers": (
        ("ALTER TABLE post DROP COLUMN created_at", "ALTER TABLE post ADD COLUMN created_at INTEGER",
        "UPDATE post SET created_at = 20190603"),
        "post.created_at holds '20190603', in which no year",
    ),
    "Danbooru's own types": ((DANBOORU,),
    r"Danbooru's own numbers \(0 general, 1 artist, 3 copyright, 4 character, 5 meta\); "
        "the stages read those of danbooru2023.db"),
    "Danbooru's own types and a stray 2": ((DANBOORU, "INSERT INTO tag VALUES (9, 'x', 2, 1)"),
    "Danbooru's own numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_database_that_would_be_misread_is_refused_with_what_is_expected(path, case):
    statements, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        schema.check_schema(change(path, *statements))


def test_a_database_of_texts_is_refused(path):
    with pytest.raises(UserError, match="post.id holds the text '.*'; a whole number belongs there"):
        schema.check_schema(as_text(path))


def test_the_remedy_for_danboorus_types_makes_the_database_readable(path):
    with pytest.raises(UserError) as refused:
        schema.check_schema(change(path, DANBOORU))
    mend = refused.value.message.rpartition("copy: ")[2]
    assert schema.check_schema(change(path, mend)) == [] and change(path).tags()["type"].to_pylist() == [
        kind for _, _, kind in TAGS
    ]


def test_type_4_without_a_character_or_a_known_meta_tag_is_reported_as_doubtful(path):
    doubts = schema.check_schema(
        change(path, "DELETE FROM tag WHERE type IN (2, 4)", "INSERT INTO tag VALUES (7, 'marumi', 4, 1)")
    )
    assert len(doubts) == 1 and "1 of type 4 (meta), for example marumi" in doubts[0]
    assert schema.check_schema(change(path, "INSERT INTO tag VALUES (8, 'highres', 4, 1)")) == []


ACCEPTED = {
    "single odd rows": (
        "UPDATE post SET rating = 'g', fav_count = NULL, created_at = 'no date' WHERE id = 3",
        "UPDATE tag SET type = 5 WHERE id = 1",
    ),
    "no index": ("DROP INDEX pair_post", "DROP INDEX pair_tag"),
    "no dates": ("UPDATE post SET created_at = NULL",),
    "no meta tag and no character": ("DELETE FROM tag WHERE type IN (2, 4)",),
    "the columns of later revisions": (
        "ALTER TABLE post DROP COLUMN tag_list",
        "ALTER TABLE post ADD COLUMN updated_at TEXT",
    ),
    "names in capitals": ("ALTER TABLE post RENAME COLUMN rating TO RATING",),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_database_that_the_stages_can_read_is_accepted(path, case):
    assert schema.check_schema(change(path, *ACCEPTED[case])) == []


def test_the_miniatures_database_is_accepted():
    assert schema.check_schema(Database(ROOT / "data" / "danbooru2023.db")) == []


def test_the_first_stage_and_preflight_refuse_it_and_write_nothing(path, tmp_path):
    change(path, DANBOORU)
    command = [
        sys.executable,
        str(ROOT / "stages" / "select.py"),
        "--params",
        str(ROOT / "miniature" / "params.yaml"),
        "--database",
        str(path),
        "--out",
        str(tmp_path / "out.parquet"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "Danbooru's own numbers" in done.stderr
        and "Traceback" not in done.stderr
        and not (tmp_path / "out.parquet").exists()
    )

    from kohaku_delta.params import Pin, load

    recipe = load(ROOT / "miniature" / "params.yaml")
    download = recipe.download.model_copy(
        update={"inputs": {"database": Pin(url=f"file://{path}", bytes=None, sha256=None)}}
    )
    error = host_facts.database_error(recipe.model_copy(update={"download": download}), tmp_path)
    result = host_checks.check_database(host_facts.Host(locked={}, database=error), recipe)
    assert not result.ok and "Danbooru's own numbers" in result.what and "docs/recipe.md" in result.remedy
