"""Parquet files whose bytes depend on the table's content only: no pandas metadata, one compression, row groups of a
fixed length. A missing file or column is an error that names it.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError

ROW_GROUP = 1 << 16
FORMAT = {
    "compression": "zstd",
    "compression_level": 1,
    "version": "2.6",
    "store_schema": False,
    "dictionary_pagesize_limit": 1 << 26,
}


@contextmanager
def open_writer(path, schema: pa.Schema, plain: list[str] | None = None, metadata: dict[str, str] | None = None):
    """Yields `append(table)`. Rows are regrouped, so the bytes do not depend on the size of the appended tables.

    `plain`: columns without a dictionary, because their texts hardly repeat. A dictionary column inside a list cannot
    be regrouped: append tables of ROW_GROUP rows then. `metadata`: texts by key, stored in the file.
    """
    schema = schema.remove_metadata()
    pending: list[pa.Table] = []
    encoded = [_leaf_column(field) for field in schema if field.name not in plain] if plain else True
    ranged = [
        field.name for field in schema if field.name not in (plain or []) and not pa.types.is_list(field.type)
    ]  # the least and greatest value of a list mean nothing

    with (
        atomic_files.atomic_write(path) as file,
        pq.ParquetWriter(file, schema, use_dictionary=encoded, write_statistics=ranged, **FORMAT) as parquet,
    ):

        def flush(last: bool) -> None:
            table = pa.concat_tables(pending) if pending else schema.empty_table()
            while table.num_rows >= ROW_GROUP or (last and table.num_rows):
                parquet.write_table(table.slice(0, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
                table = table.slice(ROW_GROUP)
            pending[:] = [table] if table.num_rows else []

        def append(table: pa.Table) -> None:
            pending.append(table.select(schema.names).cast(schema).replace_schema_metadata(None))
            if sum(part.num_rows for part in pending) >= ROW_GROUP:
                flush(last=False)

        yield append
        flush(last=True)
        if metadata:
            parquet.add_key_value_metadata(metadata)


def _leaf_column(field: pa.Field) -> str:
    """Parquet's name for a column's values."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def write(table: pa.Table, path, metadata: dict[str, str] | None = None) -> None:
    """Write a table."""
    with open_writer(path, table.schema, metadata=metadata) as append:
        append(table)


def read(path, columns: list[str] | None = None) -> pa.Table:
    """The named columns in that order (default: all). Raises UserError for a missing file or column, or damage."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. An earlier stage writes it: run `dvc repro`, or name the file by its option."
        )
    sys.audit("open", os.fspath(path), "r", os.O_RDONLY)  # Arrow opens it in C, which the sandbox cannot see
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read ({error}). Run its stage again.") from None
    missing = [name for name in columns or [] if name not in present]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(present)}. Was another file meant?"
        )
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}. Run its stage again.") from None
