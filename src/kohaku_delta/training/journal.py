"""Invariant: a row a step, equal on every host and world size, each chained to the one before: a changed past changes every later row.

The chain begins with the header: the base's content digest and the parameters that move bits. What varies from host to host (times,
throughput, memory) is not in it.
"""

import hashlib
import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_delta import table
from kohaku_delta.refusal import Refusal

HEADER = "kohaku_delta"  # key of the file's metadata
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("visits", pa.string()),  # sha256 of the step's posts and visit counters, little-endian int64, in order
        ("losses", pa.list_(pa.float32())),  # mean loss of each micro-batch, in place order
        ("lanes", pa.list_(pa.uint64())),  # fingerprint of each lane's gradient (float32, scaled), in lane order
        ("gradient_norm", pa.float64()),  # of the sum, before clipping
        ("learning_rate_unet", pa.float64()),
        ("learning_rate_text", pa.float64()),
        ("scale", pa.float64()),
        ("weights", pa.uint64()),  # fingerprints after the step
        ("optimizer", pa.uint64()),
        ("tensors", pa.binary()),  # a byte of each weight's fingerprint, by ascending name
        ("chain", pa.string()),
    ]
)


def visits_digest(rows: list[dict]) -> str:
    """sha256 of a step's micro-batches: the posts and counters of each."""
    return hashlib.sha256(b"".join(struct.pack("<qq", *pair) for row in rows for pair in zip(row["posts"], row["visits"], strict=True))).hexdigest()


class Journal:
    """Rows so far. `header`: what the chain begins with."""

    def __init__(self, header: dict, rows: list[dict] | None = None):
        self.header, self.rows = header, rows or []

    def append(self, row: dict) -> None:
        self.rows.append(row | {"chain": link(self.rows[-1]["chain"] if self.rows else start(self.header), row)})

    def write(self, path) -> None:
        """The file: the rows, and the header among its metadata."""
        table.write(pa.Table.from_pylist(self.rows, schema=SCHEMA), path, {HEADER: json.dumps(self.header, sort_keys=True)})


def start(header: dict) -> str:
    """sha256 of the header: what the first row is chained to."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def link(before: str, row: dict) -> str:
    """sha256 of the chain so far and the row's values."""
    lists = struct.pack(f"<{len(row['losses'])}f{len(row['lanes'])}Q", *row["losses"], *row["lanes"])
    numbers = struct.pack("<iddddQQ", row["step"], row["gradient_norm"], row["learning_rate_unet"], row["learning_rate_text"], row["scale"], row["weights"], row["optimizer"])
    return hashlib.sha256(before.encode() + row["visits"].encode() + lists + numbers + row["tensors"]).hexdigest()


def read(path) -> Journal:
    """A journal whose chain is whole. Refuses a file that is none, and names the first row that the chain does not hold."""
    rows = table.read(path, SCHEMA.names).to_pylist()
    metadata = pq.read_schema(Path(path)).metadata or {}
    try:
        header = json.loads(metadata[HEADER.encode()])
    except (KeyError, ValueError):
        raise Refusal(f"{path} has no header ({HEADER} in its metadata): it is not a journal of this recipe's train stage.") from None
    before = start(header)
    for place, row in enumerate(rows):
        if row["step"] != place or row["chain"] != link(before, row):
            raise Refusal(f"{path}: the chain breaks at row {place}: its step is {row['step']}, and it does not follow from the rows before it. The journal was changed.")
        before = row["chain"]
    return Journal(header, rows)
