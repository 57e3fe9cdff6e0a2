"""Invariant: a row a step, equal on every host and world size, each chained to the one before: a changed past changes
every later row.

The chain begins with the header: the base's content digest and the parameters that move bits. A finished training's
ends with the content digest of the LoKr file that came of it. What varies from host to host (times, throughput, memory)
is not in it.
"""

import hashlib
import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet

HEADER = "kohaku_delta"  # keys of the file's metadata
LOKR, SEAL = "lokr", "seal"  # the LoKr's content digest, and the chain's last link, over that
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
    return hashlib.sha256(
        b"".join(struct.pack("<qq", *pair) for row in rows for pair in zip(row["posts"], row["visits"], strict=True))
    ).hexdigest()


class Journal:
    """Rows so far. `header`: what the chain begins with. `lokr`: content digest of the file that it ends with; None
    while training goes on.
    """

    def __init__(self, header: dict, rows: list[dict] | None = None, lokr: str | None = None):
        self.header, self.rows, self.lokr = header, rows or [], lokr

    def append(self, row: dict) -> None:
        self.rows.append(
            row | {"chain": chain_hash(self.rows[-1]["chain"] if self.rows else header_hash(self.header), row)}
        )

    def write(self, path) -> None:
        """The file: the rows, and what the chain begins and ends with among its metadata."""
        end = {LOKR: self.lokr, SEAL: final_hash(self.rows[-1]["chain"], self.lokr)} if self.lokr else {}
        parquet.write(
            pa.Table.from_pylist(self.rows, schema=SCHEMA),
            path,
            {HEADER: json.dumps(self.header, sort_keys=True)} | end,
        )


def header_hash(header: dict) -> str:
    """sha256 of the header: what the first row is chained to."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def chain_hash(before: str, row: dict) -> str:
    """sha256 of the chain so far and the row's values."""
    lists = struct.pack(f"<{len(row['losses'])}f{len(row['lanes'])}Q", *row["losses"], *row["lanes"])
    numbers = struct.pack(
        "<iddddQQ",
        row["step"],
        row["gradient_norm"],
        row["learning_rate_unet"],
        row["learning_rate_text"],
        row["scale"],
        row["weights"],
        row["optimizer"],
    )
    return hashlib.sha256(before.encode() + row["visits"].encode() + lists + numbers + row["tensors"]).hexdigest()


def _link(before: str, row: dict) -> str | None:
    """link, of a row that may be anything."""
    try:
        return chain_hash(before, row)
    except (struct.error, TypeError, AttributeError, OverflowError):
        return None


def final_hash(chain: str, lokr: str) -> str:
    """sha256 of the last row's chain and the LoKr's content digest."""
    return hashlib.sha256(f"{chain} {lokr}".encode()).hexdigest()


def read_journal(path) -> Journal:
    """A journal whose chain is whole. Refuses a file that is none, and names the first row that the chain does not
    hold.
    """
    rows = parquet.read(path, SCHEMA.names).to_pylist()
    metadata = pq.read_schema(Path(path)).metadata or {}
    try:
        header = json.loads(metadata[HEADER.encode()])
        if not isinstance(header, dict):
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(
            f"{path} has no header ({HEADER} in its metadata): it is not a journal of this recipe's train stage."
        ) from None
    before = header_hash(header)
    for place, row in enumerate(rows):
        if row["step"] != place or row["chain"] != _link(before, row):
            raise UserError(
                f"{path}: the chain breaks at row {place}: its step is {row['step']}, and it does not follow from the rows before it. The journal was changed."
            )
        before = row["chain"]
    lokr, sealed = (metadata.get(key.encode(), b"").decode("ascii", "replace") or None for key in (LOKR, SEAL))
    if lokr and (not rows or sealed != final_hash(before, lokr)):
        raise UserError(
            f"{path}: the chain breaks at its end: the LoKr that it names does not follow from row {len(rows) - 1}. The journal was changed."
        )
    return Journal(header, rows, lokr)
