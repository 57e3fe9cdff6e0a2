"""Pairs that are cut out of the file's pages are those that SQLite gives, whatever the file holds."""

import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from danbooru_factory import write_database
from kohaku_delta.danbooru import database, sqlite_pages
from kohaku_delta.danbooru.database import Database
from kohaku_delta.errors import UserError


def asked(path):
    """Every pair, one row after another, from Python's own SQLite."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT post_id << 32 | tag_id FROM posttagrelation ORDER BY id").fetchall()
    connection.close()
    return [pair for (pair,) in rows if pair is not None]


def read(path):
    return np.concatenate([np.empty(0, np.int64), *Database(path).relations(np.copy)]).tolist()


def make(
    path, rows, size=4096, columns="id INTEGER NOT NULL PRIMARY KEY, post_id INTEGER, tag_id INTEGER", mode="DELETE"
):
    write_database(path, [{"id": 1}])
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("DROP TABLE posttagrelation")
        connection.execute(f"CREATE TABLE posttagrelation ({columns})")
        connection.execute(f"PRAGMA page_size = {size}")
        connection.execute("VACUUM")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO posttagrelation VALUES (?, ?, ?)", rows)
        connection.execute("COMMIT")
        connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.close()
    return path


def rows(seed, count, step=1, high=7_000_000):
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.integers(1, step + 1, count))
    posts = np.where(rng.random(count) < 0.1, rng.integers(0, 300, count), rng.integers(0, high, count))
    return list(zip(ids.tolist(), posts.tolist(), rng.integers(0, 1_500_000, count).tolist(), strict=True))


@pytest.fixture
def cut(monkeypatch):
    """How many pieces were cut out of pages, and how many were left to SQLite."""
    counts, pairs = {"cut": 0, "left": 0}, sqlite_pages.read_pairs

    def counted(*arguments):
        found = pairs(*arguments)
        counts["left" if found is None else "cut"] += 1
        return found

    monkeypatch.setattr(sqlite_pages, "read_pairs", counted)
    return counts


@pytest.mark.parametrize("size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("step", [1, 40_000])
def test_plain_tables_are_cut_out_of_pages_as_sqlite_reads_them(tmp_path, monkeypatch, cut, size, step):
    path = make(tmp_path / "a.db", rows(1, 20_000, step), size)
    monkeypatch.setattr(database, "LEAVES", 5)
    assert read(path) == asked(path)
    assert cut["cut"] > 0 and cut["left"] == 0


@pytest.mark.parametrize(
    "odd",
    [-1, -(2**40), 2**31, 2**40, 2**62, 1.5, "x", "12", b"\1\2", None, 0, 1, 127, 128, -128, 2**15, 2**23, -(2**31)],
)
def test_odd_values_between_plain_ones_are_read_as_sqlite_reads_them(tmp_path, monkeypatch, odd):
    plain = rows(2, 3000)
    first, second = plain[700], plain[2000]
    plain[700], plain[2000] = (first[0], odd, first[2]), (second[0], second[1], odd)
    path = make(tmp_path / "a.db", plain, 512)
    monkeypatch.setattr(database, "LEAVES", 3)
    assert read(path) == asked(path)


def test_what_sqlite_must_read_is_left_to_it(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(database, "LEAVES", 3)
    plain = rows(3, 2000)
    for place, columns in enumerate(
        (
            "id INTEGER NOT NULL, post_id INTEGER, tag_id INTEGER, PRIMARY KEY (id)", "id INTEGER PRIMARY KEY DESC, post_id INTEGER, tag_id INTEGER",
            "id INT PRIMARY KEY, post_id INTEGER, tag_id INTEGER", "id INTEGER PRIMARY KEY, tag_id INTEGER, post_id INTEGER", "id INTEGER, post_id INTEGER, tag_id INTEGER",
            "id INTEGER PRIMARY KEY, post_id TEXT, tag_id INTEGER", "id INTEGER PRIMARY KEY, post_id REAL, tag_id INTEGER", "id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER) STRICT; --",
        )
    ):  # fmt: skip
        path = make(tmp_path / f"{place}.db", plain, 1024, columns.removesuffix(") STRICT; --"))
        assert read(path) == asked(path)
    cut.update(cut=0, left=0)
    path = make(tmp_path / "wal.db", plain, 1024, mode="WAL")
    with sqlite3.connect(path) as writer:
        writer.execute("INSERT INTO posttagrelation VALUES (9000, 5, 6)")
        writer.commit()
        assert read(path)[-1] == 5 << 32 | 6
    writer.close()
    assert cut["cut"] == 0
    assert read(make(tmp_path / "empty.db", [])) == []


def test_a_column_that_was_added_later_is_read_as_sqlite_reads_it(tmp_path):
    path = make(tmp_path / "a.db", [(1, 7, 8)])
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "DROP TABLE posttagrelation; CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER); INSERT INTO posttagrelation VALUES (1, 7);"
            # fmt: skip
            "ALTER TABLE posttagrelation ADD COLUMN tag_id INTEGER DEFAULT 5; INSERT INTO posttagrelation VALUES (2, 8, 9)"
        )
    connection.close()
    assert read(path) == [7 << 32 | 5, 8 << 32 | 9]


def test_a_damaged_file_gives_a_sentence_or_no_fewer_pairs_than_sqlite_alone(tmp_path, monkeypatch):
    plain, path = make(tmp_path / "a.db", rows(4, 4000), 512).read_bytes(), tmp_path / "b.db"
    monkeypatch.setattr(database, "LEAVES", 4)
    monkeypatch.setattr(database, "SPAN", 1 << 30)
    leaves, refused = sqlite_pages.list_leaf_pages, 0
    for seed in range(150):
        rng, data = np.random.default_rng(seed), bytearray(plain)
        for _ in range(rng.integers(1, 15)):
            place, length = int(rng.integers(600, len(data) - 4)), int(rng.integers(1, 4))
            data[place : place + length] = rng.bytes(length)
        path.write_bytes(data)
        try:
            found = read(path)
        except UserError as refusal:
            assert str(path) in str(refusal)
            refused += 1
            continue
        monkeypatch.setattr(sqlite_pages, "list_leaf_pages", lambda *_: None)
        alone = read(path)  # refuses nothing that was read above
        monkeypatch.setattr(sqlite_pages, "list_leaf_pages", leaves)
        assert found == alone or len(found) > len(alone)
    assert 0 < refused < 150


def test_a_writer_is_kept_out_while_pages_are_read(tmp_path, monkeypatch):
    path = make(tmp_path / "a.db", rows(5, 5000), 512)
    monkeypatch.setattr(database, "LEAVES", 1)
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0); c.execute('UPDATE posttagrelation SET tag_id = 1'); c.commit()"
    reading = Database(path).relations(np.copy)
    next(reading)
    write = [sys.executable, "-c", code, path]  # a process of its own: locks are a process's
    assert "database is locked" in subprocess.run(write, stderr=subprocess.PIPE, text=True).stderr
    reading.close()
    subprocess.run(write, check=True)
    assert {pair & 0xFFFFFFFF for pair in read(path)} == {1}
