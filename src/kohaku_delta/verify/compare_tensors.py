"""Invariant: two checkpoints are called equal only where every bit of every tensor is; where they differ, it is said
where and by how much.

`compare(a, b)` takes single files, LoKr files and diffusers folders, reads both once, in pieces, and knows three
answers: the same bytes, the same tensors in another container (header, order, metadata), or other tensors. Two LoKr
files whose tensors differ are compared by what they do, scale · kron(w1, w2): one difference has many factorings.
Distances are counted in ulp of the coarser of the two dtypes: how many of its numbers lie between two values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes
from kohaku_delta.parallel import THREADS, ordered_map
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER
from kohaku_delta.verify.tensor_sources import LazyTensor, Part, TensorSource, open_tensor_source

NUMBERS = 1 << 20  # of a tensor compared at a time
COARSE = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}  # bits of the significand


@dataclass
class Difference:
    """How a tensor differs; `ulps` in `dtype`, `largest` in value (infinite where one side is not a number)."""

    name: str
    dtype: str
    count: int
    unequal: int = 0
    largest: float = 0.0
    ulps: int = 0
    cast: bool = False  # the dtypes differ

    @property
    def equal_share(self) -> float:
        return 1 - self.unequal / self.count if self.count else 1.0


@dataclass
class Comparison:
    """What `compare` found. `by_product`: LoKr files, compared by kron(w1, w2)."""

    tensors: int
    elements: int
    unequal: int
    differences: list[Difference]
    only: tuple[list[str], list[str]]
    other_shape: list[str]
    container: list[str] = field(default_factory=list)  # what else differs, a sentence each
    by_product: bool = False

    @property
    def same_tensors(self) -> bool:
        return not (self.differences or self.only[0] or self.only[1] or self.other_shape)

    @property
    def same_bytes(self) -> bool:
        return self.same_tensors and not self.by_product and not self.container

    def worst(self, count: int) -> list[Difference]:
        """The tensors that differ most in value, then in ulp."""
        return sorted(self.differences, key=lambda each: (-each.largest, -each.ulps, each.name))[:count]


def compare_files(a: Path, b: Path, threads: int = THREADS, numbers: int = NUMBERS) -> Comparison:
    """Compares what two paths hold. Refuses paths that cannot be read, and two things that have nothing in common."""
    with open_tensor_source(a) as first, open_tensor_source(b) as second:
        if first.folder != second.folder:
            views = tuple(each.stored() if each.folder else each.as_folder() for each in (first, second))
            container = ["one is a folder, the other a single file" + _left_out(first, second)]
        else:
            views = first.stored(), second.stored()
            container = _container(first, second)
        if not set(views[0]) & set(views[1]):
            raise UserError(
                f"{a} and {b} have no tensor in common ({_some(views[0])}; {_some(views[1])}). Two checkpoints, two LoKr files or two folders can be compared."
            )
        found = _compare(*views, threads, numbers)
        if first.lokr and second.lokr and not found.same_tensors:
            found = _compare(first.differences(), second.differences(), threads, numbers)
            found.by_product = True
        found.container = container
        return found


def _compare(a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], threads: int, numbers: int) -> Comparison:
    shared = [name for name in sorted(a) if name in b]
    other = {
        name
        for name in shared
        if a[name].shape != b[name].shape
        or (a[name].dtype != b[name].dtype and not {a[name].dtype, b[name].dtype} <= set(COARSE))
    }
    differences: dict[str, Difference] = {}

    def work(item: tuple[str, Part, Part, int, int]) -> Difference:
        name, part_a, part_b, start, stop = item
        return measure_difference(name, part_a(start, stop), part_b(start, stop), a[name].dtype, b[name].dtype)

    unequal = elements = 0
    for piece in ordered_map(work, _items((name for name in shared if name not in other), a, b, numbers), threads):
        unequal, elements = unequal + piece.unequal, elements + piece.count
        if piece.unequal or piece.cast:
            known = differences.setdefault(
                piece.name, Difference(piece.name, piece.dtype, a[piece.name].count, cast=piece.cast)
            )
            known.unequal += piece.unequal
            known.largest, known.ulps = max(known.largest, piece.largest), max(known.ulps, piece.ulps)
    only = [name for name in sorted(a) if name not in b], [name for name in sorted(b) if name not in a]
    lines = [
        f"{name}: {a[name].dtype} {list(a[name].shape)} against {b[name].dtype} {list(b[name].shape)}"
        for name in sorted(other)
    ]
    return Comparison(len(shared), elements, unequal, list(differences.values()), only, lines)


def _items(
    names, a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], numbers: int
) -> Iterator[tuple[str, Part, Part, int, int]]:
    for name in names:
        parts, count = (a[name].open(), b[name].open()), a[name].count
        grain = max(a[name].grain, b[name].grain, 1)
        step = max(numbers // grain, 1) * grain
        yield from ((name, *parts, start, min(start + step, count)) for start in range(0, count, step))


def measure_difference(name: str, a: np.ndarray, b: np.ndarray, dtype_a: str, dtype_b: str) -> Difference:
    """How two arrays of stored numbers differ: by bits where they have one dtype, by value where they have two."""
    dtype = min(dtype_a, dtype_b, key=lambda each: COARSE.get(each, 0))
    found = Difference(name, dtype, a.size, cast=dtype_a != dtype_b)
    if not found.cast and np.array_equal(_bits(a), _bits(b)):
        return found
    with np.errstate(all="ignore"):
        if dtype in COARSE:
            wide = np.float64 if "F64" in (dtype_a, dtype_b) else np.float32
            x, y = (
                each.astype(wide) if own == "F64" else dtypes.to_float32(each, own).astype(wide)
                for each, own in ((a, dtype_a), (b, dtype_b))
            )
            if found.cast:
                unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
                a, b = (dtypes.from_float32(each.astype(np.float32), dtype) for each in (x, y))
            else:
                unequal = _bits(a) != _bits(b)
            gap = np.abs(x.astype(np.float64) - y)[unequal]
        else:
            unequal = _bits(a) != _bits(b)
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))[unequal]
        steps = _apart(_ordered(a, dtype)[unequal], _ordered(b, dtype)[unequal])
        gap = steps if dtype.startswith("F8") else gap  # 8-bit floats are not computed with
    found.unequal = int(unequal.sum())
    if found.unequal:
        found.largest = float(np.where(np.isfinite(gap), gap, np.inf).max())
        found.ulps = int(steps.max())
    return found


def _bits(raw: np.ndarray) -> np.ndarray:
    return raw.view(f"u{raw.dtype.itemsize}")


def _ordered(raw: np.ndarray, dtype: str) -> np.ndarray:
    """int64 numbers that stand as far apart as the stored values have steps between them; both zeros are 0."""
    if dtype not in COARSE and not dtype.startswith("F8"):
        return raw.astype(np.int64)
    bits = _bits(raw).astype(np.int64)
    sign = 1 << 8 * raw.dtype.itemsize - 1
    return np.where(bits & -sign, -(bits & sign - 1), bits)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a − b|, which int64 may not hold, as uint64."""
    return np.where(a >= b, a.view(np.uint64) - b.view(np.uint64), b.view(np.uint64) - a.view(np.uint64))


def _container(a: TensorSource, b: TensorSource) -> list[str]:
    """What differs beside the tensors, a sentence each."""
    if not a.folder:
        one, other = a.files[""], b.files[""]
        if one.header_bytes() == other.header_bytes():
            return []
        keys = sorted(
            key for key in {*one.metadata, *other.metadata} if one.metadata.get(key) != other.metadata.get(key)
        )
        if keys:
            return [f"metadata differ: {', '.join(keys)}"]
        return ["the headers differ in the order or spacing of their entries"] if one.specs == other.specs else []
    differ = [
        place
        for place in sorted({*a.others, *b.others})
        if place not in a.others
        or place not in b.others
        or a.others[place].read_bytes() != b.others[place].read_bytes()
    ]
    heads = [
        place
        for place in sorted({*a.files, *b.files})
        if place not in a.files
        or place not in b.files
        or a.files[place].header_bytes() != b.files[place].header_bytes()
    ]
    said = [f"other files differ: {', '.join(differ)}"] if differ else []
    return said + ([f"headers or places differ: {', '.join(heads)}"] if heads else [])


def _left_out(a: TensorSource, b: TensorSource) -> str:
    single = (b if a.folder else a).files[""]
    left = [name for name in NO_PARAMETER if name in single.specs]
    return f", whose {' and '.join(left)} a folder does not hold" if left else ""


def _some(names) -> str:
    first = next(iter(sorted(names)), None)
    return f"one has {first}" if first else "one is empty"
