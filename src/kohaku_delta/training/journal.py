"""The journal: one row per step, equal on every host and with any number of ranks, in a hash chain.

Each row is chained to the one before, so a changed row changes every later one. The chain begins with the header: the
base's content digest, the parameters that decide the result and, if the training began with a LoKr file, its sha256
(network_weights). After the last step it ends with the content digest of the LoKr file. What varies between hosts
(times, throughput, memory) is not in the journal. Needs no torch.

In a saved state the journal is a folder of parquet files: the rows up to the last milestone, which the states after it
share by a hard link, and the rows since then. So a save does not write all rows again, and each state is still whole.
"""

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet

HEADER = "kohaku_delta"  # keys of the file's metadata
LOKR, SEAL = "lokr", "seal"  # the LoKr's content digest; final_hash() of the chain and that
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
        ("weights", pa.uint64()),  # combined fingerprint of the weights after the step
        ("optimizer", pa.uint64()),  # the same of the optimizer's state
        ("tensors", pa.binary()),  # one byte of each weight's fingerprint, by ascending name
        ("chain", pa.string()),
    ]
)

CURVES = "step,loss,gradient_norm,learning_rate_unet,learning_rate_text\n"


def curve_lines(rows: list[dict]) -> Iterator[str]:
    """The lines of curves.csv: per step the mean of its losses, the gradient's norm and the rates."""
    yield CURVES
    for row in rows:
        loss = sum(row["losses"]) / len(row["losses"])
        values = (loss, row["gradient_norm"], row["learning_rate_unet"], row["learning_rate_text"])
        yield f"{row['step']},{','.join(map(repr, values))}\n"


def visits_digest(rows: list[dict]) -> str:
    """sha256 of a step's schedule rows: the (post, visit counter) pairs in order."""
    pairs = (pair for row in rows for pair in zip(row["posts"], row["visits"], strict=True))
    return hashlib.sha256(b"".join(struct.pack("<qq", *pair) for pair in pairs)).hexdigest()


class Journal:
    """The rows so far.

    header: what the chain begins with. lokr: content digest of the LoKr file that the chain ends with; None until the
    training is finished. saved: the folder in which the newest saved state has the rows up to it.
    """

    def __init__(
        self, header: dict, rows: list[dict] | None = None, lokr: str | None = None, saved: Path | None = None
    ):
        self.header, self.rows, self.lokr, self.saved = header, rows or [], lokr, saved

    def append(self, row: dict) -> None:
        """Add a row without its chain hash, which is computed here."""
        previous = self.rows[-1]["chain"] if self.rows else header_hash(self.header)
        self.rows.append(row | {"chain": chain_hash(previous, row)})

    def write(self, path: Path) -> None:
        """Write the rows; what the chain begins and ends with goes into the file's metadata."""
        end = {LOKR: self.lokr, SEAL: final_hash(self.rows[-1]["chain"], self.lokr)} if self.lokr else {}
        self._write_rows(path, 0, len(self.rows), end)

    def write_parts(self, folder: Path, milestone: int) -> None:
        """Write the rows to a new folder: those up to the last multiple of `milestone` steps, and those since then.

        The file of the first ones becomes a hard link to that of `saved`, if the file system can link. A milestone has
        a file of its own, so that damage to the shared one costs the steps since the milestone at most.
        """
        folder.mkdir()
        done = len(self.rows)
        first = done - done % milestone
        if first and not (first < done and self._link_first_part(folder, first)):
            self._write_rows(folder / _part_name(0), 0, first)
        if first < done:
            self._write_rows(folder / _part_name(first), first, done)

    def _link_first_part(self, folder: Path, rows: int) -> bool:
        """Link the file of the first `rows` rows of `saved` into the folder. Returns whether that was possible."""
        if not self.saved or not (self.saved / _part_name(rows)).exists():
            return False
        try:
            os.link(self.saved / _part_name(0), folder / _part_name(0))
        except OSError:
            return False
        return True

    def _write_rows(self, path: Path, first: int, end: int, metadata: dict[str, str] | None = None) -> None:
        parquet.write(
            pa.Table.from_pylist(self.rows[first:end], schema=SCHEMA),
            path,
            {HEADER: json.dumps(self.header, sort_keys=True)} | (metadata or {}),
        )


def _part_name(first: int) -> str:
    """The file of the rows from step `first` on."""
    return f"{first:08d}.parquet"


def header_hash(header: dict) -> str:
    """sha256 of the header; the first row is chained to it."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def chain_hash(previous: str, row: dict) -> str:
    """sha256 of the previous row's chain hash (the header's, for the first row) and the row's values."""
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
    return hashlib.sha256(previous.encode() + row["visits"].encode() + lists + numbers + row["tensors"]).hexdigest()


def _chain_hash_or_none(previous: str, row: dict) -> str | None:
    """chain_hash() of a row read from a file; None if its values have no such hash."""
    try:
        return chain_hash(previous, row)
    except (struct.error, TypeError, AttributeError, OverflowError):
        return None


def final_hash(chain: str, lokr: str) -> str:
    """sha256 of the last row's chain hash and the LoKr's content digest."""
    return hashlib.sha256(f"{chain} {lokr}".encode()).hexdigest()


def read_journal(path: Path) -> Journal:
    """Read a journal, a file or a saved state's folder of files, and verify its chain. Raises UserError for another
    file, and names the first row that is wrong.
    """
    parts = _read_folder(path) if path.is_dir() else [_read_part(path)]
    header, metadata = parts[-1].header, parts[-1].metadata
    rows = [row for part in parts for row in part.rows]
    previous = header_hash(header)
    for index, row in enumerate(rows):
        if row["step"] != index or row["chain"] != _chain_hash_or_none(previous, row):
            raise UserError(
                f"{path}: the chain breaks at row {index}: its step is {row['step']}, and it does not follow from the "
                "rows before it. The journal was changed."
            )
        previous = row["chain"]
    lokr, sealed = (metadata.get(key.encode(), b"").decode("ascii", "replace") or None for key in (LOKR, SEAL))
    if lokr and (not rows or sealed != final_hash(previous, lokr)):
        raise UserError(
            f"{path}: the chain breaks at its end: the LoKr that it names does not follow from row {len(rows) - 1}. "
            "The journal was changed."
        )
    return Journal(header, rows, lokr, path if path.is_dir() else None)


class _Part(NamedTuple):
    header: dict
    rows: list[dict]
    metadata: dict[bytes, bytes]


def _read_folder(folder: Path) -> list[_Part]:
    visible = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))  # .DS_Store, .nfs…
    names = sorted(itertools.islice(visible, 3))
    parts = [_read_part(folder / name) for name in names[:2]]
    expected = [_part_name(0), _part_name(len(parts[0].rows))] if parts else []
    if not names or names != expected[: len(names)] or parts[0].header != parts[-1].header:
        raise UserError(f"{folder} does not hold the files of one journal; it has {', '.join(names) or 'none'}.")
    return parts


def _read_part(path: Path) -> _Part:
    table = parquet.read_bounded(path, SCHEMA.names)
    for field in SCHEMA:
        column = table[field.name]
        if column.type != field.type or column.null_count:
            raise UserError(
                f"{path}: the column {field.name} is not what the train stage writes ({field.type}, no nulls)."
            )
    metadata = pq.read_schema(path).metadata or {}
    try:
        header = json.loads(metadata[HEADER.encode()])
        if not isinstance(header, dict):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise UserError(
            f"{path} has no header ({HEADER} in its metadata): it is not a journal of this recipe's train stage."
        ) from None
    return _Part(header, table.to_pylist(), metadata)
