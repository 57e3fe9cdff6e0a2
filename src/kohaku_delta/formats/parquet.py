"""Parquet files whose bytes depend on the table's content only: no pandas metadata, one compression, row groups of a
fixed length. A missing file or column is an error that names it.
"""

import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError

ROW_GROUP = 1 << 16
MAX_TABLE = 4 << 30  # bytes of values that read_bounded reads; the release's captions take about 2 GB
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
    _footer(path, columns)
    return _read_table(path, columns)


def read_bounded(path, columns: list[str] | None = None) -> pa.Table:
    """The same of a stranger's file. Raises UserError if its rows or values would take more than MAX_TABLE bytes.

    A small file can claim many rows (repeated values take no place), and repeat a long text: texts are first read as
    numbers and a list of distinct ones. What the footer does not announce is stopped by a limit of the memory.
    """
    path = Path(path)
    footer = _footer(path, columns)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns]
    size = sum(8 * chunk.num_values + chunk.total_uncompressed_size for chunk in chunks)
    if size > MAX_TABLE or footer.num_rows > MAX_TABLE // 8:
        raise UserError(_too_large(path))
    texts = sorted({chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"})
    with _limited_memory():
        table = _read_table(path, columns, texts)
        if sum(map(_text_bytes, table.columns)) > MAX_TABLE:
            raise UserError(_too_large(path))
        decoded = pa.schema([field.with_type(_plain_type(field.type)) for field in table.schema])
        return table.cast(decoded)


def _too_large(path: Path) -> str:
    return f"{path} holds more than {MAX_TABLE:,} bytes of values, the limit for a table of a rebuild."


@contextmanager
def _limited_memory():
    """Within it this process gets at most 2 * MAX_TABLE bytes more of memory than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * MAX_TABLE
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes that a column's texts take once each is written out."""
    total = 0
    for chunk in column.chunks:
        while pa.types.is_list(chunk.type):
            chunk = chunk.flatten()
        if pa.types.is_dictionary(chunk.type):
            lengths = pc.cast(pc.binary_length(chunk.dictionary), pa.int64())
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _footer(path: Path, columns: list[str] | None) -> pq.FileMetaData:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. An earlier stage writes it: run `dvc repro`, or name the file by its option."
        )
    sys.audit("open", os.fspath(path), "r", os.O_RDONLY)  # Arrow opens it in C, which the sandbox cannot see
    try:
        footer = pq.read_metadata(path)
        present = footer.schema.to_arrow_schema().names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read ({error}). Run its stage again.") from None
    missing = [name for name in columns or [] if name not in present]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(present)}. Was another file meant?"
        )
    return footer


def _read_table(path: Path, columns: list[str] | None, texts: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, read_dictionary=texts)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}. Run its stage again.") from None
