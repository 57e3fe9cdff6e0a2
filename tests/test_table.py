"""Row groups that were encoded apart make the file that the library's one writer writes."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kohaku_delta import table


def drawn(rows, seed=1):
    rng = np.random.default_rng(seed)
    words = pa.DictionaryArray.from_arrays(pa.array(rng.integers(0, 50, 3 * rows).astype(np.int32)), pa.array([f"word {place}" for place in range(50)]))
    ends = pa.array(np.arange(0, 3 * rows + 1, 3, np.int32))
    return pa.table(
        {
            "id": np.cumsum(rng.integers(1, 9, rows)), "some": pa.array(rng.integers(0, 5, rows).astype(np.int32), mask=rng.random(rows) < 0.2),
            "good": rng.random(rows) < 0.5, "text": [f"text {number}" for number in rng.integers(0, 10**9, rows)], "words": pa.ListArray.from_arrays(ends, words),
        }
    )  # fmt: skip


@pytest.mark.parametrize("rows", [0, 1, 999, 1000, 1001, 7000])
@pytest.mark.parametrize("at_once", [1, 4])
def test_the_file_is_the_one_writers_byte_for_byte(tmp_path, monkeypatch, rows, at_once):
    monkeypatch.setattr(table, "ROW_GROUP", 1000)
    monkeypatch.setattr(table, "AT_ONCE", at_once)
    whole = drawn(rows)
    with table.writer(tmp_path / "a.parquet", whole.schema, plain=["text"]) as append:
        for start in range(0, rows, 1000):
            append(whole.slice(start, 1000).combine_chunks())
    file, encoded = io.BytesIO(), ["id", "some", "good", "words.list.element"]
    with pq.ParquetWriter(file, whole.schema, use_dictionary=encoded, write_statistics=encoded, **table.FORMAT) as parquet:
        if rows:
            parquet.write_table(whole, row_group_size=1000)
    assert (tmp_path / "a.parquet").read_bytes() == file.getvalue()


def test_the_bytes_do_not_depend_on_how_rows_were_appended(tmp_path):
    whole = drawn(30_000).drop_columns("words")
    files = []
    for number, length in enumerate((30_000, 8192, 1024, 777, 1)):
        with table.writer(tmp_path / f"{number}.parquet", whole.schema) as append:
            for start in range(0, 30_000 if length > 1 else 300, length):
                append(whole.slice(start, length))
            if length == 1:
                append(whole.slice(300))
        files.append((tmp_path / f"{number}.parquet").read_bytes())
    assert len(set(files)) == 1
    assert pq.read_table(tmp_path / "0.parquet").equals(whole)
