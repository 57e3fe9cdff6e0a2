"""The header of safetensors files: checked as a whole before it is used, and written as its contents decide.

A file starts with the header's length (8 bytes, little endian) and the header as JSON: name → dtype, shape, offsets.
`parse_header` accepts a header only if it is not too long, is JSON, names nothing twice, and if its tensors cover the
rest of the file once and without holes. `build_header` lists tensors by dtype (largest first) and name.

The content digest is equal for two files with the same tensors: sha256 over one line per tensor in name order, `name
dtype shape sha256-of-bytes`. Metadata, order and alignment are not in it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes

MAX_HEADER = 64 << 20  # bytes. SDXL's has 0.3 MB; the published LoKr's, with every tag it was trained on, about 14 MB
MAX_STRUCTURE = 4 << 20  # bytes of it outside strings: each may take a hundred bytes of memory when parsed
MAX_NUMBERS = 1 << 48  # of a tensor
MAX_DIMENSIONS = 32
STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a header describes it. dtype: safetensors' name, as in dtypes.NUMPY."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * dtypes.BYTES[self.dtype]


class _Malformed(Exception):
    """Why a header is refused."""


def parse_header(
    path: Path, descriptor: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
    """(specs in name order, offset of each tensor in the file, metadata) of an open file of `size` bytes. Raises
    UserError for one that is not whole and well formed.
    """
    try:
        return _parse(descriptor, size)
    except _Malformed as reason:
        raise UserError(f"{path} cannot be used: {reason}. Fetch it again, or name another file.") from None


def _parse(descriptor: int, size: int) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
    header, start = _read_json(descriptor, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("its metadata is not a mapping of texts")
    try:
        "".join((*header, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError:
        raise _Malformed("its header holds half of a surrogate pair, which is not a character") from None
    specs, offsets, spans = {}, {}, []
    for name in sorted(header):
        entry = header[name]
        if reason := _entry_fault(entry):
            raise _Malformed(f"the entry {name!r:.120} {reason}")
        specs[name] = TensorSpec(entry["dtype"], tuple(entry["shape"]))
        first, last = entry["data_offsets"]
        offsets[name] = start + first
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise _Malformed(
                f"the tensor {name!r:.120} begins at byte {first} instead of {end}: tensors overlap or leave a hole"
            )
        end = last
    if start + end != size:
        raise _Malformed(
            f"its tensors end at byte {start + end} and the file has {size} bytes: it is cut short or was added to"
        )
    return specs, offsets, metadata


def _read_json(descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON gives it, and the offset of the first tensor."""
    start = os.pread(descriptor, 16, 0)
    if start.startswith(PICKLES) and start[8:9] != b"{":  # 640, 0x280, is a header's length too
        raise _Malformed(
            "it is a pickle (a .ckpt or .pt file), not safetensors; such a file can run code when it is loaded and is "
            "not opened here"
        )
    if size < 10:
        raise _Malformed(f"it has {size} bytes, too few for safetensors")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise _Malformed(
            f"its header claims {length} bytes and the file has {size}: it is cut short or not safetensors"
        )
    if length > MAX_HEADER:
        raise _Malformed(f"its header claims {length} bytes; at most {MAX_HEADER} are read")
    text = os.pread(descriptor, length, 8)
    if len(text) != length or text[:1] != b"{":
        raise _Malformed("its header is missing or does not begin with {: it is not safetensors")
    if length > MAX_STRUCTURE and len(STRINGS.sub(b"", text)) > MAX_STRUCTURE:
        raise _Malformed(f"its header has more than {MAX_STRUCTURE} bytes outside of texts")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique), 8 + length
    except (ValueError, RecursionError):
        raise _Malformed("its header is not JSON that can be read") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Malformed(f"its header names {next(name for name in names if names.count(name) > 1)!r:.80} twice")
    return mapping


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with a tensor's entry in the header; None if it is well formed."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "does not hold exactly dtype, shape and data_offsets"
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BYTES:
        return f"has the dtype {dtype!r:.40}, which is not known"
    # an empty tensor may not have absurd sides either
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or is_too_large(shape):
        return "has no proper shape"
    if not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
        return "has no proper offsets"
    if prod(shape) * dtypes.BYTES[dtype] != span[1] - span[0]:
        return f"has {span[1] - span[0]} bytes, which is not what {dtype} {shape!r:.80} takes"
    return None


def is_too_large(shape: list[int]) -> bool:
    """Whether a tensor of this shape would have more than MAX_NUMBERS numbers if no side of it were 0."""
    return prod(max(side, 1) for side in shape) > MAX_NUMBERS


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def build_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The canonical header, with its length field, and the order in which the tensors follow it."""
    order = sorted(specs, key=lambda name: (-dtypes.ORDER.index(specs[name].dtype), name))
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        spec, first = specs[name], end
        end += spec.nbytes
        content[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [first, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def content_digest(specs: Mapping[str, TensorSpec], hashes: Mapping[str, str]) -> str:
    """The content digest of tensors, from the sha256 of the bytes of each."""
    lines = (
        f"{json.dumps(name)} {specs[name].dtype} {list(specs[name].shape)} {hashes[name]}\n" for name in sorted(specs)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
