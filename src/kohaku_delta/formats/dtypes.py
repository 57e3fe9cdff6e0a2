"""Invariant: a number read is exact, a number written is rounded once, to nearest, ties to even.

safetensors' dtypes as numpy sees them. numpy has no bfloat16: its tensors travel as the bits, in uint16. fp16 is
converted by OpenCV, which uses the processor's own instructions: numpy's casts give the same bits
(tests/formats/test_dtypes.py asks for every number) and take ten times as long. Those instructions know neither
flush-to-zero nor denormals-are-zero, so no processor flag can change a bit.
"""

from functools import cache

import numpy as np

# safetensors' own order, smallest first: a file lists its tensors by dtype (largest first), then by name, so that every
# tensor is aligned
ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
)
BYTES = dict(zip(ORDER, (1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8)))
NUMPY = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "F8_E5M2": np.dtype("u1"), "F8_E4M3": np.dtype("u1"),
    "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as params.yaml writes them


@cache
def _half():
    import cv2  # not before the numerics are fixed: it reads its settings once

    cv2.setNumThreads(1)
    return cv2.convertFp16


def _convert(source: np.ndarray, out: np.ndarray) -> np.ndarray:
    if source.size:  # OpenCV sees one row of numbers, and fp16 as int16
        _half()(source.reshape(1, -1), out.reshape(1, -1))
    return out


def to_float32(raw: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """float32 values of an array as stored (`NUMPY[dtype]`); exact for all but F64, which is rounded. `out`: where to
    put them (contiguous, of its shape).
    """
    out = np.empty(raw.shape, np.float32) if out is None else out
    if dtype == "F16":
        return _convert(np.ascontiguousarray(raw).view(np.int16), out)
    if dtype == "BF16":
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    elif dtype in ("F32", "F64"):
        np.copyto(out, raw, casting="same_kind")
    else:
        raise ValueError(f"{dtype} is not a floating-point dtype that can be computed with")
    return out


def from_float32(values: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """The array to store as `dtype`. What does not fit becomes infinite, as IEEE has it: the caller looks. `out`: where
    to put it (contiguous).
    """
    if dtype not in FLOATS:
        raise ValueError(f"{dtype} is not a floating-point dtype that can be computed with")
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty(values.shape, NUMPY[dtype]) if out is None else out
    if dtype == "F16":
        _convert(values, out.view(np.int16))
    elif dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        np.copyto(out, np.where(np.isnan(values), np.uint32(0x7FC0), rounded), casting="unsafe")
    else:
        np.copyto(out, values)
    return out


def finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether an array as stored holds neither NaN nor infinity."""
    if dtype in ("F16", "BF16"):
        exponent = np.uint16(0x7C00 if dtype == "F16" else 0x7F80)
        return not bool(((raw.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(raw).all()) if dtype in FLOATS else True
