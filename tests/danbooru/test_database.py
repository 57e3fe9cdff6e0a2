import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from danbooru_factory import GENERAL, change, write_database
from kohaku_delta import params
from kohaku_delta.danbooru import database
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
    with pytest.raises(UserError, match=f"has no table {name}. Is it danbooru2023.db"):
        captions.caption_posts(change(path, f"DROP TABLE {name}"), [1, 2], parameters)


@pytest.mark.parametrize(
    "name, column", [("post", "created_at"), ("post", "fav_count"), ("tag", "type"), ("posttagrelation", "tag_id")]
)
def test_a_missing_column_is_named(path, parameters, name, column):
    with pytest.raises(UserError, match=f"has no column {column} in its table {name}; it has id"):
        captions.caption_posts(change(path, f"ALTER TABLE {name} RENAME COLUMN {column} TO other"), [1, 2], parameters)


def test_a_locked_database_is_told_as_such(path):
    code = "import sqlite3, sys; held = sqlite3.connect(sys.argv[1], isolation_level=None); held.execute('BEGIN EXCLUSIVE'); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="is locked by another program. Close that program"):
            Database(path).post_ids()
        holder.communicate("\n")
    assert len(Database(path).post_ids()) == 2000


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_database_is_refused_before_it_is_read(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match="is truncated: it has .* bytes. Download it again"):
        Database(path)


def test_a_damaged_database_is_told_as_such(path, parameters):
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 40] = bytes(4096 * 37)
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged or truncated. Download it again"):
        captions.caption_posts(Database(path), range(1, 2001), parameters)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "is empty"),
        (b"PK\3\4" + b"x" * 5000, "is not an SQLite database"),
        (b"SQLite format 3\0" + b"\xff" * 5000, "is not an SQLite database|is damaged|cannot be read|is truncated"),
    ],
)
def test_what_is_no_database_is_refused(tmp_path, data, said):
    (tmp_path / "a.db").write_bytes(data)
    with pytest.raises(UserError, match=said):
        Database(tmp_path / "a.db").post_ids()
    with pytest.raises(UserError, match="is not there"):
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


def test_ids_far_apart_and_tables_without_a_primary_key_are_read_all_the_same(tmp_path, parameters):
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


def test_an_id_that_stands_twice_is_refused(path):
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
