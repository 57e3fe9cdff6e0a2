"""What LyCORIS adds to a weight, in float32: scale · kron(w1, w2[, k, k]), or a stored difference. Any range of rows
can be computed alone.

Products of two fp16 numbers are exact in float32, so the difference of a LoKr with whole factors is not rounded before
it is added to the weight.
"""

from math import prod

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats.safetensors_io import SafetensorsFile


class DenseDelta:
    """A difference that the file stores as it is (norm weights and biases, full matrices)."""

    def __init__(self, values: np.ndarray, shape: tuple[int, ...]):
        self._values = values.reshape(shape)
        self.shape = shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, (stop - start, …), float32."""
        return self._values[start:stop]


class KronDelta:
    """scale · kron(w1, w2), w1 (a, c), w2 (b, d[, k, k]): (a·b, c·d[, k, k])."""

    def __init__(self, w1: np.ndarray, w2: np.ndarray, scale: float, shape: tuple[int, ...]):
        self._w1, self._w2, self._scale, self.shape = w1, w2.reshape(len(w2), -1), np.float32(scale), shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, (stop - start, …), float32."""
        b, inner = self._w2.shape
        product = np.empty((stop - start, self._w1.shape[1], inner), np.float32)
        for i in range(start // b, -(-stop // b)):  # rows i·b … (i + 1)·b are w1[i] times all of w2
            first, last = max(start, i * b), min(stop, (i + 1) * b)
            np.multiply(
                self._w1[i][:, None],
                self._w2[first - i * b : last - i * b, None],
                out=product[first - start : last - start],
            )
        if self._scale != 1:
            product *= self._scale
        return product.reshape(stop - start, *self.shape[1:])


def load_delta(
    file: SafetensorsFile, module: str, kind: str, parts: dict[str, str], shape: tuple[int, ...], bias: bool
) -> DenseDelta | KronDelta:
    """The difference of an entry's weight (or bias) in the module's `shape`. `parts`: suffix → tensor name. Raises
    UserError for parts that do not give that shape, and for values that are not finite.
    """
    whole = ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")  # an alpha may be one; weights may not
    read = {
        suffix: file.read(name).astype(np.float32)
        if suffix == "alpha" and file.specs[name].dtype in whole
        else file.float32(name)
        for suffix, name in parts.items()
    }
    for suffix, values in read.items():
        # alpha means nothing if both factors are whole; some trainers left it infinite then
        if not np.isfinite(values).all() and not (suffix == "alpha" and {"lokr_w1", "lokr_w2"} <= set(parts)):
            raise UserError(
                f"{file.path}: {parts[suffix]} holds NaN or infinity. The file is damaged, or its training diverged."
            )
    if "alpha" in read and read["alpha"].size != 1:
        raise UserError(
            f"{file.path}: {parts['alpha']} has {read['alpha'].size} numbers, and alpha is one number: the file is "
            "damaged."
        )
    if kind != "lokr":
        values = read[{"norm": "b_norm" if bias else "w_norm", "full": "diff_b" if bias else "diff"}[kind]]
        if values.size != prod(shape):
            raise _other_shape(file, module, values.shape, shape)
        return DenseDelta(values, shape)
    found = delta_shape(file, module, kind, parts, bias) or ()  # before anything is multiplied: factors can be small
    if found[0] != shape[0] or prod(found) != prod(shape):
        raise _other_shape(file, module, found, shape)
    w1, w2, rank = read.get("lokr_w1"), read.get("lokr_w2"), None
    try:
        if w1 is None:
            w1, rank = read["lokr_w1_a"] @ read["lokr_w1_b"], read["lokr_w1_b"].shape[0]
        if w2 is None:
            a, b = read["lokr_w2_a"], read["lokr_w2_b"]
            rank = b.shape[0]
            if "lokr_t2" in read:
                w2 = np.einsum("ij...,ip,jr->pr...", read["lokr_t2"], a, b)
            else:
                w2 = (a @ b.reshape(rank, -1)).reshape(a.shape[0], -1, *(shape[2:] if b.ndim == 2 else b.shape[2:]))
    except ValueError:
        raise UserError(f"{file.path}: the factors of {module} do not fit each other: the file is damaged.") from None
    if rank == 0:
        raise UserError(f"{file.path}: the factors of {module} have rank 0: the file is damaged.")
    # if both factors are whole, LyCORIS takes scale 1, whatever alpha is
    scale = 1.0 if rank is None or "alpha" not in read else float(read["alpha"].reshape(-1)[0]) / rank
    if (
        w1.ndim != 2
        or w2.ndim < 2
        or (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]) != shape[:2]
        or prod(w2.shape[2:]) != prod(shape[2:])
    ):
        raise _other_shape(file, module, (w1.shape, w2.shape), shape)
    return KronDelta(w1, w2, scale, shape)


def delta_shape(
    file: SafetensorsFile, module: str, kind: str, parts: dict[str, str], bias: bool
) -> tuple[int, ...] | None:
    """The shape of what an entry adds to its weight (or bias), from the entry alone; None if it adds nothing there."""
    shapes = {suffix: file.specs[name].shape for suffix, name in parts.items()}
    if kind != "lokr":
        return shapes.get({"norm": "b_norm" if bias else "w_norm", "full": "diff_b" if bias else "diff"}[kind])
    if bias:
        return None
    try:
        a, c = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        if "lokr_w2" in shapes:
            b, d, *kernel = shapes["lokr_w2"]
        elif "lokr_t2" in shapes:
            (_, b), (_, d), (_, _, *kernel) = shapes["lokr_w2_a"], shapes["lokr_w2_b"], shapes["lokr_t2"]
        else:
            (b, _), (_, d, *kernel) = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
    except KeyError as missing:
        raise UserError(f"{file.path}: {module} has no {missing.args[0]}: the file is not whole.") from None
    except (ValueError, IndexError):
        raise UserError(f"{file.path}: the factors of {module} do not fit each other: the file is damaged.") from None
    return a * b, c * d, *kernel


def _other_shape(file: SafetensorsFile, module: str, found, shape: tuple[int, ...]) -> UserError:
    return UserError(
        f"{file.path}: {module} has the shape {found}, and the base's tensor takes {list(shape)}: it was trained on a "
        "model with another architecture."
    )
