"""safetensors' dtypes in numpy, and their conversion: a number that is read is exact, one that is written is rounded
once, to nearest, ties to even.

numpy has no bfloat16: those tensors are their bits, in uint16. fp16 is converted by OpenCV, which uses the processor's
own instructions: the same bits as numpy's casts (tests/formats/test_dtypes.py compares every number), and merge and
bake take little more than half the time (docs/performance.md). Those instructions ignore the processor's flush-to-zero
flags, so no flag can change a bit.
"""

from functools import cache

import numpy as np

# safetensors' own order, smallest first. A file lists its tensors by dtype (largest first), then by name, so that every
# tensor is aligned
NUMPY = {
    name: np.dtype(code)
    for name, code in (
        ("BOOL", "?"), ("U8", "u1"), ("I8", "i1"), ("F8_E5M2", "u1"), ("F8_E4M3", "u1"),
        ("I16", "<i2"), ("U16", "<u2"), ("F16", "<f2"), ("BF16", "<u2"),
        ("I32", "<i4"), ("U32", "<u4"), ("F32", "<f4"), ("F64", "<f8"), ("I64", "<i8"), ("U64", "<u8"),
    )
}  # fmt: skip
ORDER = tuple(NUMPY)
BYTES = {name: dtype.itemsize for name, dtype in NUMPY.items()}
FLOATS = ("F16", "BF16", "F32", "F64")
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as params.yaml writes them


@cache
def _opencv():
    import cv2  # only once the numerics are set: it reads its settings when it is imported

    cv2.setNumThreads(1)
    return cv2


def _convert_fp16(source: np.ndarray, out: np.ndarray) -> None:
    if source.size:  # OpenCV sees one row of numbers, and fp16 as int16
        _opencv().convertFp16(source.reshape(1, -1), out.reshape(1, -1))


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The values of an array as stored (`NUMPY[dtype]`, any shape) in a new float32 array. Exact, except that F64 is
    rounded. Raises ValueError for a dtype that is not in FLOATS.
    """
    if dtype in ("F32", "F64"):
        return stored.astype(np.float32, order="C")
    values = np.empty(stored.shape, np.float32)
    if dtype == "F16":
        _convert_fp16(np.ascontiguousarray(stored).view(np.int16), values)
    elif dtype == "BF16":
        np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        raise ValueError(f"{dtype} is not a floating-point dtype that can be computed with")
    return values


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """A new array of float32 `values` as `dtype` stores them. What is too large becomes infinite, as in IEEE 754; the
    caller checks with `all_finite`. Raises ValueError for a dtype that is not in FLOATS.
    """
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "F16":
        stored = np.empty(values.shape, NUMPY[dtype])
        _convert_fp16(values, stored.view(np.int16))
        return stored
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(NUMPY[dtype])
    if dtype in FLOATS:
        return values.astype(NUMPY[dtype])
    raise ValueError(f"{dtype} is not a floating-point dtype that can be computed with")


def all_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether an array as stored holds neither NaN nor infinity."""
    if dtype in ("F16", "BF16"):
        exponent = np.uint16(0x7C00 if dtype == "F16" else 0x7F80)
        return not bool(((stored.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(stored).all()) if dtype in FLOATS else True
