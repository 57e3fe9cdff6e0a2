"""Invariant: a row a step, equal on every host and world size, each chained to the one before: a changed past changes every later row.

What varies from host to host (times, throughput) is not in it.
"""

import hashlib
import struct

import pyarrow as pa
import torch

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("visits", pa.string()),  # sha256 of the step's visit counters, little-endian int64, in order
        ("losses", pa.list_(pa.float32())),  # mean loss of each micro-batch, in place order
        ("gradient_norm", pa.float64()),
        ("learning_rate_unet", pa.float64()),
        ("learning_rate_text", pa.float64()),
        ("scale", pa.float64()),
        ("weights", pa.uint64()),
        ("optimizer", pa.uint64()),
        ("chain", pa.string()),
    ]
)
ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: multiplying by it loses nothing


def fingerprint(tensors: dict[str, torch.Tensor]) -> int:
    """uint64 of named tensors in integer arithmetic modulo 2^64: Σ_tensors h(name) · Σ_i (2i + 1) · ODD · bits_i. Order-free."""
    total = 0
    for name, tensor in tensors.items():
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
        bits = tensor.detach().contiguous().view(-1).view(kind).to(torch.int64)
        places = torch.arange(1, 2 * bits.numel(), 2, dtype=torch.int64, device=bits.device)
        folded = int((bits * places).sum().item()) * ODD
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
        total += folded * key
    return total & (2**64 - 1)


def visits_digest(visits: list[list[int]]) -> str:
    """sha256 of all counters of a step, micro-batch after micro-batch."""
    return hashlib.sha256(b"".join(struct.pack("<q", each) for batch in visits for each in batch)).hexdigest()


class Journal:
    """Rows so far. `start` is the digest that the chain begins with: the base's content digest."""

    def __init__(self, start: str, rows: list[dict] | None = None):
        self.start, self.rows = start, rows or []

    def append(self, row: dict) -> None:
        self.rows.append(row | {"chain": link(self.rows[-1]["chain"] if self.rows else self.start, row)})

    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self.rows, schema=SCHEMA)


def link(before: str, row: dict) -> str:
    """sha256 of the chain so far and the row's values."""
    losses = struct.pack(f"<{len(row['losses'])}f", *row["losses"])
    numbers = struct.pack("<iddddQQ", row["step"], row["gradient_norm"], row["learning_rate_unet"], row["learning_rate_text"], row["scale"], row["weights"], row["optimizer"])
    return hashlib.sha256(before.encode() + row["visits"].encode() + losses + numbers).hexdigest()
