"""Invariant: a safetensors header is believed only after it was checked whole, as something hostile; the one that is
written depends on contents only.

A file begins with the header's length (8 bytes, little endian), then JSON: name → dtype, shape, place. `parse` refuses
what is too long, not JSON, names a thing twice, or does not cover the rest of the file once and without holes.
`compose` writes it with tensors by dtype (largest first) and name, and sorted metadata.

The content digest is what two files share that hold the same tensors in other containers: sha256 over one line a tensor
in name order, `name dtype shape sha256-of-bytes`; metadata, order and alignment are not in it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes

LIMIT = 64 << 20  # SDXL's is 0.3 MB; the published LoKr's, with every tag that it saw, about 14 MB
STRUCTURE_LIMIT = 4 << 20  # of it outside texts: parsed, each byte may take a hundred
MOST = 1 << 48  # numbers of a tensor, which no file has
TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


@dataclass(frozen=True)
class TensorSpec:
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * dtypes.BYTES[self.dtype]


def parse_header(
    path: Path, descriptor: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
    """(specs in name order, place of each tensor in the file, metadata) of an open file of `size` bytes. Refuses what
    is not whole and well formed.
    """

    def refuse(reason: str):
        raise UserError(f"{path} cannot be used: {reason}. Fetch it again, or name another file.")

    start = os.pread(descriptor, 16, 0)
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        refuse(
            "it is a pickle (a .ckpt or .pt file), not safetensors; such a file can run code when it is loaded and is not opened here"
        )
    if size < 10:
        refuse(f"it has {size} bytes, too few for safetensors")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        refuse(f"its header claims {length} bytes and the file has {size}: it is cut short or not safetensors")
    if length > LIMIT:
        refuse(f"its header claims {length} bytes, more than the {LIMIT} that are read")
    text = os.pread(descriptor, length, 8)
    if len(text) != length or text[:1] != b"{":
        refuse("its header is not there or does not begin with {: it is not safetensors")

    if length > STRUCTURE_LIMIT and len(TEXTS.sub(b"", text)) > STRUCTURE_LIMIT:
        refuse(f"its header has more than {STRUCTURE_LIMIT} bytes outside of texts")

    def unique(pairs):
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            names = [name for name, _ in pairs]
            refuse(f"its header names {next(name for name in names if names.count(name) > 1)!r:.80} twice")
        return mapping

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        refuse("its header is not JSON that can be read")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("its metadata is not a mapping of texts")
    try:
        "".join((*header, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError:
        refuse("its header holds half of a surrogate pair, which is no character")
    specs, offsets, ends = {}, {}, []
    for name in sorted(header):
        reason = _entry_fault(header[name])
        if reason:
            refuse(f"the entry {name!r:.120} {reason}")
        entry = header[name]
        begin, end = entry["data_offsets"]
        specs[name] = TensorSpec(entry["dtype"], tuple(entry["shape"]))
        offsets[name] = 8 + length + begin
        ends.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(ends):
        if begin != place:
            refuse(
                f"the tensor {name!r:.120} begins at byte {begin} where {place} was due: tensors overlap or leave a hole"
            )
        place = end
    if place != size - 8 - length:
        refuse(
            f"its tensors end at byte {place + 8 + length} and the file has {size} bytes: it is cut short or was added to"
        )
    return specs, offsets, metadata


def _entry_fault(entry) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "does not hold exactly dtype, shape and data_offsets"
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BYTES:
        return f"has the dtype {dtype!r:.40}, which is not known"

    def counts(values) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    if (
        not counts(shape) or len(shape) > 32 or prod(max(side, 1) for side in shape) > MOST
    ):  # an empty tensor may have absurd sides too
        return "has no proper shape"
    if not counts(span) or len(span) != 2 or span[0] > span[1]:
        return "has no proper offsets"
    if prod(shape) * dtypes.BYTES[dtype] != span[1] - span[0]:
        return f"has {span[1] - span[0]} bytes, which is not what {dtype} {shape!r:.80} takes"
    return None


def build_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The canonical header (length field included) and the order in which the tensors follow it."""
    order = sorted(specs, key=lambda name: (-dtypes.ORDER.index(specs[name].dtype), name))
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in order:
        spec = specs[name]
        content[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [place, place + spec.nbytes]}
        place += spec.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def content_digest(specs: Mapping[str, TensorSpec], hashes: Mapping[str, str]) -> str:
    lines = (
        f"{json.dumps(name)} {specs[name].dtype} {list(specs[name].shape)} {hashes[name]}\n" for name in sorted(specs)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
