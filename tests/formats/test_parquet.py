"""A parquet file's bytes depend on its rows, not on how they came."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_delta.formats import parquet


def test_the_bytes_do_not_depend_on_how_rows_were_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP", 1 << 13)
    rng = np.random.default_rng(1)
    whole = pa.table(
        {
            "id": np.cumsum(rng.integers(1, 9, 30_000)),
            "some": pa.array(rng.integers(0, 5, 30_000).astype(np.int32), mask=rng.random(30_000) < 0.2),
            "good": rng.random(30_000) < 0.5,
            "text": [f"text {number}" for number in rng.integers(0, 10**9, 30_000)],
        }
    )
    files = []
    for number, length in enumerate((30_000, 8192, 1024, 777, 1)):
        with parquet.open_writer(tmp_path / f"{number}.parquet", whole.schema) as append:
            for start in range(0, 30_000 if length > 1 else 300, length):
                append(whole.slice(start, length))
            if length == 1:
                append(whole.slice(300))
        files.append((tmp_path / f"{number}.parquet").read_bytes())
    assert len(set(files)) == 1
    assert pq.read_table(tmp_path / "0.parquet").equals(whole)


CONCEALED = """
import resource, sys
from pathlib import Path
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
parquet.MAX_TABLE = 64 << 20  # bytes; a limit of 4 GiB acts in the same way
before = resource.getrlimit(resource.RLIMIT_AS)
parquet._read_table = lambda *rest: bytearray(1 << 30)
try:
    parquet.read_bounded(Path(sys.argv[1]))
except MemoryError:
    print("refused")
assert resource.getrlimit(resource.RLIMIT_AS) == before
parquet.MAX_TABLE = 4 << 30
try:
    parquet.read_bounded(Path(sys.argv[1]))
except (AttributeError, TypeError):  # a gigabyte is within the limit of eight; it is no table
    print("within")
"""


def test_what_a_footer_conceals_is_stopped_by_a_limit_of_the_memory(tmp_path):
    """Twice MAX_TABLE more than the process has: 8 GiB, and here 128 MiB; while a table is read, and no longer."""
    assert parquet.MAX_TABLE == 4 << 30
    parquet.write(pa.table({"id": [1, 2]}), tmp_path / "t.parquet")
    command = [sys.executable, "-c", CONCEALED, str(tmp_path / "t.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "refused\nwithin\n", done.stdout + done.stderr
