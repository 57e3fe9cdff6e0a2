"""Comparison of two checkpoints, LoKr files or diffusers folders, tensor by tensor and bit by bit.

Both are read once, in pieces. There are three results: the same bytes; the same tensors in another container (header,
order, metadata); or other tensors, and then which and by how much. Two LoKr files with other tensors are compared by
their effect, scale · kron(w1, w2), because one difference has many factorings. Distances are counted in ulp of the
coarser of two dtypes: the number of its steps between two values.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes
from kohaku_delta.mappings import differing_keys
from kohaku_delta.parallel import THREADS, ordered_map
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER
from kohaku_delta.verify.tensor_sources import LazyTensor, ReadPart, TensorSource, open_tensor_source

PIECE = 1 << 20  # numbers of a tensor compared at a time
SIGNIFICAND = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}  # bits, the implicit one included


@dataclass
class Difference:
    """How one tensor differs. dtype: the coarser of the two, whose ulps are counted; largest: in value, infinite if one
    side is not a finite number.
    """

    name: str
    dtype: str
    count: int
    unequal: int = 0
    largest: float = 0.0
    ulps: int = 0
    cast: tuple[str, str] | None = None  # the dtypes, if they differ

    @property
    def only_cast(self) -> bool:
        """Whether the values are equal once they are rounded to the coarser dtype, and finite."""
        return self.cast is not None and not self.ulps and self.largest < inf


@dataclass
class Comparison:
    """tensors: the number of names in both; only: the names in one; other_shape: those of another shape or kind;
    container: sentences about what else differs; by_product: LoKr files, compared by kron(w1, w2).
    """

    tensors: int
    elements: int
    unequal: int
    differences: list[Difference]
    only: tuple[list[str], list[str]]
    other_shape: list[str]
    container: list[str] = field(default_factory=list)
    by_product: bool = False

    @property
    def same_tensors(self) -> bool:
        return not (self.differences or self.only[0] or self.only[1] or self.other_shape)

    @property
    def only_dtype(self) -> bool:
        """Whether tensors differ, and all of these in their dtype only."""
        same_names = not (self.only[0] or self.only[1] or self.other_shape)
        return bool(self.differences) and same_names and all(each.only_cast for each in self.differences)

    @property
    def same_bytes(self) -> bool:
        return self.same_tensors and not self.by_product and not self.container

    def worst(self, count: int) -> list[Difference]:
        """The tensors that differ most: in value, then in ulp."""
        return sorted(self.differences, key=lambda each: (-each.largest, -each.ulps, each.name))[:count]


def compare_files(a: Path, b: Path, threads: int = THREADS, piece: int = PIECE) -> Comparison:
    """Compares what two paths hold. Raises UserError for a path that cannot be read, and for two without a common
    tensor.
    """
    with open_tensor_source(a) as first, open_tensor_source(b) as second:
        if first.is_folder != second.is_folder:
            one, other = (source.stored() if source.is_folder else source.as_folder() for source in (first, second))
            container = [f"one is a folder, the other a single file{_not_in_folder(first, second)}"]
        else:
            one, other = first.stored(), second.stored()
            container = _container_differences(first, second)
        if not set(one) & set(other):
            examples = "; ".join(f"one has {min(names)}" if names else "one is empty" for names in (one, other))
            raise UserError(
                f"{a} and {b} have no tensor in common ({examples}). Two checkpoints, two LoKr files or two folders "
                "can be compared."
            )
        comparison = _compare(one, other, threads, piece)
        if first.is_lokr and second.is_lokr and not (comparison.same_tensors or comparison.only_dtype):
            comparison = _compare(first.differences(), second.differences(), threads, piece)
            comparison.by_product = True
        if comparison.same_tensors and not comparison.elements:
            raise UserError(f"{a} and {b} hold no numbers: nothing can be compared.")
        comparison.container = container
        return comparison


def _compare(a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], threads: int, piece: int) -> Comparison:
    shared = sorted(a.keys() & b.keys())
    comparable = [
        name
        for name in shared
        if a[name].shape == b[name].shape
        and (a[name].dtype == b[name].dtype or {a[name].dtype, b[name].dtype} <= SIGNIFICAND.keys())
    ]

    def compare_piece(item: tuple[str, ReadPart, ReadPart, int, int]) -> Difference:
        name, read_a, read_b, start, stop = item
        return measure_difference(name, read_a(start, stop), read_b(start, stop), a[name].dtype, b[name].dtype)

    differences: dict[str, Difference] = {}
    unequal = elements = 0
    for part in ordered_map(compare_piece, _pieces(comparable, a, b, piece), threads):
        unequal, elements = unequal + part.unequal, elements + part.count
        if part.unequal or part.cast:
            whole = Difference(part.name, part.dtype, a[part.name].count, cast=part.cast)
            whole = differences.setdefault(part.name, whole)
            whole.unequal += part.unequal
            whole.largest, whole.ulps = max(whole.largest, part.largest), max(whole.ulps, part.ulps)
    other_shape = [
        f"{name}: {a[name].dtype} {list(a[name].shape)} against {b[name].dtype} {list(b[name].shape)}"
        for name in shared
        if name not in set(comparable)
    ]
    only = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    return Comparison(len(shared), elements, unequal, list(differences.values()), only, other_shape)


def _pieces(
    names: Iterable[str], a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor], piece: int
) -> Iterator[tuple[str, ReadPart, ReadPart, int, int]]:
    """(name, reader of a, reader of b, start, stop) of every piece of every tensor."""
    for name in names:
        read_a, read_b, count = a[name].open(), b[name].open(), a[name].count
        grain = max(a[name].grain, b[name].grain, 1)
        length = max(piece // grain, 1) * grain
        for start in range(0, count, length):
            yield name, read_a, read_b, start, min(start + length, count)


def measure_difference(name: str, a: np.ndarray, b: np.ndarray, dtype_a: str, dtype_b: str) -> Difference:
    """How two flat arrays of stored numbers differ: by bits if they have one dtype, by value if they have two."""
    dtype = min(dtype_a, dtype_b, key=lambda kind: SIGNIFICAND.get(kind, 0))
    difference = Difference(name, dtype, a.size, cast=(dtype_a, dtype_b) if dtype_a != dtype_b else None)
    unequal = _bits(a) != _bits(b) if dtype_a == dtype_b else None
    if unequal is not None and not unequal.any():
        return difference
    with np.errstate(all="ignore"):
        x, y = a, b
        if dtype in SIGNIFICAND:
            wide = np.float64 if "F64" in (dtype_a, dtype_b) else np.float32
            x, y = (
                array.astype(wide) if kind == "F64" else dtypes.to_float32(array, kind).astype(wide)
                for array, kind in ((a, dtype_a), (b, dtype_b))
            )
        if unequal is None:
            unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
            a, b = (dtypes.from_float32(array.astype(np.float32), dtype) for array in (x, y))
        steps = _distance(_ordered(a, dtype)[unequal], _ordered(b, dtype)[unequal])
        # 8-bit floats are not converted to values: their distance in steps stands for it
        gap = steps if dtype.startswith("F8") else np.abs(x.astype(np.float64) - y.astype(np.float64))[unequal]
    difference.unequal = int(unequal.sum())
    if difference.unequal:
        difference.largest = float(np.where(np.isfinite(gap), gap, np.inf).max())
        difference.ulps = int(steps.max())
    return difference


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _ordered(array: np.ndarray, dtype: str) -> np.ndarray:
    """int64 numbers that are as far apart as there are steps between the stored values; both zeros are 0."""
    if dtype not in SIGNIFICAND and not dtype.startswith("F8"):
        return array.astype(np.int64)
    bits = _bits(array).astype(np.int64)
    sign = 1 << 8 * array.dtype.itemsize - 1
    return np.where(bits & -sign, -(bits & sign - 1), bits)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a − b| of int64 numbers as uint64, which int64 may not hold."""
    return np.where(a >= b, a.view(np.uint64) - b.view(np.uint64), b.view(np.uint64) - a.view(np.uint64))


def _container_differences(a: TensorSource, b: TensorSource) -> list[str]:
    """What differs besides the tensors, a sentence each; of two single files or two folders."""
    headers = [{place: file.header_bytes() for place, file in source.files.items()} for source in (a, b)]
    if a.is_folder:
        contents = [{place: path.read_bytes() for place, path in source.others.items()} for source in (a, b)]
        return [
            f"{what} differ: {', '.join(places)}"
            for what, places in (
                ("other files", differing_keys(*contents)),
                ("headers or places", differing_keys(*headers)),
            )
            if places
        ]
    one, other = a.files[""], b.files[""]
    if headers[0] == headers[1]:
        return []
    sentences = []
    if a.is_lokr and b.is_lokr and set(a.stored()) == set(b.stored()) and set(one.specs) != set(other.specs):
        renamed = len(one.specs.keys() - other.specs.keys())
        sentences.append(f"{renamed:,} tensors have the names of another trainer, of the same layers")
    if keys := differing_keys(one.metadata, other.metadata):
        sentences.append(f"metadata differ: {', '.join(keys)}")
    if not sentences and one.specs == other.specs:
        sentences.append("the headers differ in the order or spacing of their entries")
    return sentences


def _not_in_folder(a: TensorSource, b: TensorSource) -> str:
    single_file = (b if a.is_folder else a).files[""]
    names = [name for name in NO_PARAMETER if name in single_file.specs]
    return f", whose {' and '.join(names)} a folder does not hold" if names else ""
