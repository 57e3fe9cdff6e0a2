import shutil
import sqlite3
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from danbooru_factory import GENERAL, change, write_database
from kohaku_delta import params
from kohaku_delta.danbooru import database, post_tags, schema
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, selection
from kohaku_delta.errors import UserError
from kohaku_delta.parallel import ordered_map
from kohaku_delta.params import Range, Selection


@pytest.fixture(scope="module")
def parameters():
    return params.load("params.yaml").caption


@pytest.fixture
def path(tmp_path):
    posts = [{"id": post} for post in range(1, 2001)]
    return write_database(tmp_path / "a.db", posts, [(1, "long_hair", GENERAL)], [(post, 1) for post in range(1, 2001)])


@pytest.mark.parametrize("name", ["post", "tag", "posttagrelation"])
def test_a_missing_table_is_named(path, parameters, name):
    with pytest.raises(UserError, match=f"has no table {name}. Check that it is the whole"):
        captions.caption_posts(change(path, f"DROP TABLE {name}"), [1, 2], parameters)


@pytest.mark.parametrize(
    "name, column", [("post", "created_at"), ("post", "fav_count"), ("tag", "type"), ("posttagrelation", "tag_id")]
)
def test_a_missing_column_is_named(path, parameters, name, column):
    with pytest.raises(UserError, match=f"has no column {column} in its table {name}; it has id"):
        captions.caption_posts(change(path, f"ALTER TABLE {name} RENAME COLUMN {column} TO other"), [1, 2], parameters)


def test_a_locked_database_is_reported_as_locked(path):
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN EXCLUSIVE'); "
        "print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="is locked by another program. Close that program"):
            Database(path).post_ids()
        holder.communicate("\n")
    assert len(Database(path).post_ids()) == 2000


def files_in(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_database_in_wal_mode_is_read_and_nothing_is_left_beside_it(path, tmp_path):
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    connection.close()
    before, files = path.read_bytes(), files_in(tmp_path)
    assert before[18:20] == b"\2\2" and files == ["a.db"]
    assert len(Database(path).post_ids()) == 2000
    assert path.read_bytes() == before and files_in(tmp_path) == files
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert len(Database(path).post_ids()) == 2000  # also where nothing can be written (root writes anywhere)
    finally:
        tmp_path.chmod(0o755)


def test_changes_that_are_still_beside_a_database_are_said_with_what_brings_them_in(path):
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO post (id) VALUES (9999)")
    writer.commit()
    with pytest.raises(UserError, match="is not complete: there are changes in .*a.db-wal.*PRAGMA journal_mode"):
        Database(path)
    writer.close()
    subprocess.run([sys.executable, "-c", MEND, path], check=True)
    assert len(Database(path).post_ids()) == 2001


MEND = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA journal_mode = DELETE')"


def test_a_transaction_that_was_not_finished_is_said_with_what_brings_it_to_an_end(path, tmp_path):
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA cache_size = 2")
    writer.execute("UPDATE post SET id = id + 100000")
    (tmp_path / "left").mkdir()
    left = [shutil.copy(each, tmp_path / "left") for each in (path, f"{path}-journal")]
    writer.close()
    with pytest.raises(UserError, match="is not complete: changes to it are in a file beside it .*PRAGMA journal_mode"):
        Database(left[0]).post_ids()
    with sqlite3.connect(left[0]) as connection:
        connection.execute("SELECT count(*) FROM post").fetchall()
    connection.close()
    assert Database(left[0]).post_ids().tolist() == Database(path).post_ids().tolist()


def test_a_tag_name_that_is_not_utf8_is_named_by_its_row(path, parameters):
    broken = change(path, "INSERT INTO tag VALUES (77, CAST(X'6c6f6eff67' AS TEXT), 0, 1)")
    with pytest.raises(UserError, match=r"a tag name that is not UTF-8: tag.id 77, b'lon\\xffg'"):
        captions.caption_posts(broken, [1], parameters)


def test_text_that_is_not_utf8_in_a_column_of_numbers_is_shown_all_the_same(path):
    with pytest.raises(UserError, match="post.rating holds the text '.*'; a whole number belongs there"):
        schema.check_schema(change(path, "UPDATE post SET rating = CAST(X'ff73' AS TEXT)"))


def as_imported(path, kind="TEXT", case=str):
    """The database after an import that made every column a text, or with other names."""
    with sqlite3.connect(path) as connection:
        for table in ("post", "tag", "posttagrelation"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            declared = ", ".join(f"{case(column)} {kind}" for column in columns)
            connection.execute(f"CREATE TABLE copy ({declared})")
            connection.execute(f"INSERT INTO copy SELECT * FROM {table} ORDER BY id")
            connection.execute(f"DROP TABLE {table}")
            connection.execute(f"ALTER TABLE copy RENAME TO {case(table)}")
    connection.close()
    return Database(path)


READERS = {
    "select": lambda source, recipe: source.post_ids(),
    "caption": lambda source, recipe: captions.caption_posts(source, [1, 2], recipe.caption),
    "filter": lambda source, recipe: captions.captionable(source, np.array([1, 2]), recipe.caption),
    "statistics": lambda source, recipe: source.tags(),
    "preflight": lambda source, recipe: schema.check_schema(source),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_database_of_texts_is_refused_by_every_reader(path, reader):
    with pytest.raises(UserError, match=r"(post|tag|posttagrelation)\.\w+ holds the text '.*'; a whole number belongs"):
        READERS[reader](as_imported(path), params.load("params.yaml"))


def test_names_in_capitals_are_read_as_others(path, parameters):
    expected = captions.caption_posts(Database(path), range(1, 50), parameters)
    for kind, case in (("", str.upper), ("INTEGER", str.title)):
        assert captions.caption_posts(as_imported(path, kind, case), range(1, 50), parameters).equals(expected)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_database_is_refused_before_it_is_read(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match="is truncated: it has .* bytes. Download it again"):
        Database(path)


def test_a_damaged_database_is_reported_as_damaged(path, parameters):
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 40] = bytes(4096 * 37)
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged or truncated. Download it again"):
        captions.caption_posts(Database(path), range(1, 2001), parameters)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"PK\3\4" + b"x" * 5000, "is not an SQLite database"),
        (b"SQLite format 3\0" + b"\xff" * 5000, "is not an SQLite database|is damaged|cannot be read|is truncated"),
    ],
)
def test_a_file_that_is_no_database_is_refused(tmp_path, data, message):
    (tmp_path / "a.db").write_bytes(data)
    with pytest.raises(UserError, match=message):
        Database(tmp_path / "a.db").post_ids()
    with pytest.raises(UserError, match="does not exist"):
        Database(tmp_path / "none.db")


def test_the_order_of_rows_does_not_depend_on_spans_or_threads(path, monkeypatch):
    whole = Database(path).post_ids()
    pairs = np.concatenate(list(Database(path).relations(np.copy)))
    for span, threads in ((1, 8), (7, 1), (300, 3), (1 << 18, 2)):
        monkeypatch.setattr(database, "SPAN", span)
        monkeypatch.setattr(database, "SPANS", 1 << 20)
        monkeypatch.setattr(database, "ordered_map", partial(ordered_map, threads=threads))
        assert (Database(path).post_ids() == whole).all()
        assert (np.concatenate(list(Database(path).relations(np.copy))) == pairs).all()
        monkeypatch.undo()


def test_sparse_ids_and_tables_without_a_primary_key_are_read_too(tmp_path, parameters):
    path = write_database(
        tmp_path / "a.db", [{"id": post} for post in (-5, 0, 7, 2**62)], [(1, "solo", GENERAL)], [(7, 1)]
    )
    assert Database(path).post_ids().tolist() == [-5, 0, 7, 2**62]
    change(
        path,
        "CREATE TABLE loose AS SELECT * FROM posttagrelation",
        "DROP TABLE posttagrelation",
        "ALTER TABLE loose RENAME TO posttagrelation",
    )
    change(
        path, "INSERT INTO posttagrelation VALUES (NULL, 7, 1), (9, NULL, 1), (8, 7, NULL), (10, 'x', 1), (11, 7, 1)"
    )
    assert captions.caption_posts(Database(path), [7], parameters)["general"].to_pylist() == [
        ["solo", "solo", "recent", "safe", "normal quality"]
    ]


def test_a_repeated_id_is_refused(path):
    change(
        path,
        "CREATE TABLE loose AS SELECT * FROM post",
        "INSERT INTO loose SELECT * FROM post WHERE id = 5",
        "DROP TABLE post",
        "ALTER TABLE loose RENAME TO post",
    )
    with pytest.raises(UserError, match="post id more than once"):
        Database(path).post_ids()


def test_both_schemas_select_and_caption_alike(tmp_path, parameters):
    tables = []
    for later in (False, True):
        path = write_database(
            tmp_path / f"{later}.db", [{"id": post} for post in (1, 2, 3)], [(1, "solo", GENERAL)], [(2, 1)], later
        )
        ranges = Selection(seed=1, replacement=True, ranges=[Range(**{"from": 0, "below": None, "draw": "all"})])
        tables.append(
            (selection.select(Database(path), ranges), captions.caption_posts(Database(path), [1, 2, 3], parameters))
        )
    assert tables[0][0].equals(tables[1][0]) and tables[0][1].equals(tables[1][1])


def test_the_database_is_never_written(path, parameters):
    before = path.read_bytes()
    read_only = shutil.copy(path, path.with_name("b.db"))
    read_only.chmod(0o444)
    captions.caption_posts(Database(read_only), [1], parameters)
    assert path.read_bytes() == before == read_only.read_bytes()
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.db", "b.db"]


ODD = [
    *(-1, -(2**40), -(2**31) - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**40, 2**62, 2**63 - 1),
    *(1.5, "x", "12", b"\1\2", None, 0, 127, 128, -128, 2**15, 2**23, -(2**31)),
]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_id_in_a_pair_gives_no_post_a_tag_that_sqlites_join_does_not(tmp_path, odd):
    posts = [-1, 0, 1, 2, 7, 12, 2**31 - 1, -(2**31)]
    tags = [0, 1, 2, 3, 7, 12, 2**31, 2**32 - 1]
    pairs = [(1, 2)] * 50 + [(odd, 7), (7, odd), (odd, odd)] + [(1, 3), (1, 2**32 - 1), (2**31 - 1, 2**31)] * 50
    path = write_database(
        tmp_path / "a.db", [{"id": post} for post in posts], [(tag, f"t{tag}", GENERAL) for tag in tags], pairs
    )
    with sqlite3.connect(path) as connection:
        rows = connection.execute(
            "SELECT post.id, tag.id FROM post JOIN posttagrelation ON post.id = post_id JOIN tag ON tag.id = tag_id "
            "ORDER BY post.id, posttagrelation.id"
        ).fetchall()
    connection.close()
    source, ids, names = Database(path), np.array(sorted(posts)), np.array(sorted(tags))
    assert [
        (post, tag)
        for chunk in post_tags.map_chunks(source, ids, names, lambda chunk: chunk)
        for post, tag in sorted(
            zip(ids[chunk.post].tolist(), names[chunk.tag].tolist(), strict=True), key=lambda pair: pair[0]
        )
    ] == rows


@pytest.mark.parametrize(
    "table, odd", [("post", 2**31), ("post", 2**32 + 1), ("post", -(2**31) - 1), ("tag", 2**32), ("tag", -1)]
)
def test_a_post_or_tag_whose_id_has_no_room_in_a_pair_is_refused_by_every_stage(tmp_path, parameters, table, odd):
    posts = [{"id": 1}, *([{"id": odd}] if table == "post" else [])]
    tags = [(1, "solo", GENERAL), *([(odd, "wide", GENERAL)] if table == "tag" else [])]
    path = write_database(tmp_path / "a.db", posts, tags, [(1, 1)])
    message = rf"has a row with {table}.id {odd}; ids from .* can be read"
    with pytest.raises(UserError, match=message):
        schema.check_schema(Database(path))
    with pytest.raises(UserError, match=message):
        captions.caption_posts(Database(path), [post["id"] for post in posts], parameters)


def test_a_database_with_random_damage_is_read_as_sqlite_reads_it_or_refused(tmp_path):
    path = write_database(tmp_path / "a.db", [{"id": 1}], (), [(post, 5) for post in range(3000)])
    plain, refused = path.read_bytes(), 0
    for seed in range(40):
        rng, data = np.random.default_rng(seed), bytearray(plain)
        for _ in range(rng.integers(1, 15)):
            place, length = int(rng.integers(600, len(data) - 4)), int(rng.integers(1, 4))
            data[place : place + length] = rng.bytes(length)
        path.write_bytes(data)
        try:
            list(Database(path).relations(np.copy))
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert 0 < refused < 40
