"""Invariant: whatever a path holds (checkpoint, LoKr file, diffusers folder) is seen as named arrays whose numbers can
be had in pieces.

A LoKr file can be seen two ways: as the tensors that it stores, and as the differences that it makes, scale · kron(w1,
w2), of which no more than the asked rows are ever in memory. A checkpoint can be seen as the folder that it would be
exported to.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.safetensors_io import SafetensorsFile
from kohaku_delta.sdxl.diffusers_layout import PLACES, diffusers_name, to_diffusers
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER, Layout, TensorNameMap
from kohaku_delta.weights import lokr_format
from kohaku_delta.weights.weight_delta import delta_shape, load_delta

LORA_PREFIXES = ("lora_", "lycoris_")
COMPONENTS = {Path(place).parts[0]: part for part, place in PLACES.items()}


Part = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class LazyTensor:
    """`open()` gives part(start, stop): the numbers start…stop as stored, flat; start and stop are multiples of
    `grain`, or the end.
    """

    dtype: str
    shape: tuple[int, ...]
    open: Callable[[], Part]
    grain: int = 1

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TensorSource:
    path: Path
    files: Mapping[str, SafetensorsFile]  # by its place under `path`; "" for a single file
    others: Mapping[str, Path]  # of a folder: what is no tensor (configurations, tokenizers)

    @property
    def folder(self) -> bool:
        return "" not in self.files

    @property
    def lokr(self) -> bool:
        return (
            not self.folder
            and bool(self.files[""].specs)
            and all(name.startswith(LORA_PREFIXES) for name in self.files[""].specs)
        )

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def stored(self) -> dict[str, LazyTensor]:
        """The tensors as they stand in the file or folder (there under component/name)."""
        arrays: dict[str, LazyTensor] = {}
        for place, file in self.files.items():
            component = Path(place).parts[0] + "/" if place else ""
            for name in file.specs:
                key = component + (name.removeprefix("text_model.") if component.startswith("text_encoder") else name)
                if key in arrays:
                    raise UserError(
                        f"{self.path} has two tensors {key}, one of them in {place}: keep one variant of each component in the folder."
                    )
                arrays[key] = _stored(file, name)
        return arrays

    def differences(self) -> dict[str, LazyTensor]:
        """What a LoKr file adds to each parameter of each module, in fp32 (where products of two fp16 numbers are
        exact).
        """
        arrays: dict[str, LazyTensor] = {}
        for module, (kind, parts) in lokr_format.group_by_module(self.files[""]).items():
            for bias in (False, True):
                if (shape := delta_shape(self.files[""], module, kind, parts, bias)) is not None:
                    arrays[f"{module}.{'bias' if bias else 'weight'}"] = _difference(
                        self.files[""], module, kind, parts, shape, bias
                    )
            if "dora_scale" in parts:
                arrays[f"{module}.dora_scale"] = _stored(self.files[""], parts["dora_scale"])
        return arrays

    def as_folder(self) -> dict[str, LazyTensor]:
        """A single checkpoint's tensors under the names and in the forms of a diffusers folder."""
        file, arrays = self.files[""], {}
        for entry in TensorNameMap(Layout.of(file.specs)).entries:
            if entry.key not in file.specs or entry.key in NO_PARAMETER:
                continue
            spec = file.specs[entry.key]
            key = f"{Path(PLACES[entry.part]).parts[0]}/{diffusers_name(entry).removeprefix('text_model.')}"
            shape = entry.shape_in_module(spec.shape)
            if shape is None:
                raise UserError(f"{self.path}: {entry.key} is {list(spec.shape)}, which no SDXL model has.")
            if entry.form == "transposed":
                arrays[key] = LazyTensor(
                    spec.dtype, shape, lambda entry=entry: _parts_of(to_diffusers(entry, file.read(entry.key)))
                )
            else:
                arrays[key] = _stored(file, entry.key, shape, entry.third * prod(shape))
        return arrays


def _parts_of(array: np.ndarray) -> Part:
    return lambda start, stop: array[start:stop]


def _stored(file: SafetensorsFile, name: str, shape: tuple[int, ...] | None = None, first: int = 0) -> LazyTensor:
    spec = file.specs[name]
    size, numpy = dtypes.BYTES[spec.dtype], dtypes.NUMPY[spec.dtype]

    def part(start: int, stop: int) -> np.ndarray:
        return np.frombuffer(file.read_bytes(name, (first + start) * size, (stop - start) * size), numpy)

    return LazyTensor(spec.dtype, spec.shape if shape is None else shape, lambda: part)


def _difference(
    file: SafetensorsFile, module: str, kind: str, parts: Mapping[str, str], shape: tuple[int, ...], bias: bool
) -> LazyTensor:
    row = prod(shape[1:])

    def opened() -> Part:
        delta = load_delta(file, module, kind, parts, shape, bias)
        return lambda start, stop: delta.rows(start // row, -(-stop // row)).reshape(-1)

    # a convolution's kernel stands in w2 as one axis or as two: rows and columns are what two files share
    return LazyTensor("F32", (shape[0], row) if len(shape) > 1 else shape, opened, row)


@contextmanager
def open_tensor_source(path: Path) -> Iterator[TensorSource]:
    """What `path` holds. Refuses what is neither a safetensors file nor a folder with such files."""
    path = Path(path)
    with ExitStack() as stack:
        if not path.is_dir():
            yield TensorSource(path, {"": stack.enter_context(safetensors_io.open_file(path))}, {})
            return
        places = sorted(
            place.relative_to(path)
            for place in path.rglob("*")
            if place.is_file() and not any(part.startswith(".") for part in place.relative_to(path).parts)
        )
        tensors = [place for place in places if place.suffix == ".safetensors" and place.parts[0] in COMPONENTS]
        if not tensors:
            raise UserError(
                f"{path} is a folder without {', '.join(COMPONENTS)}: a diffusers folder, or one safetensors file, was expected."
            )
        files = {str(place): stack.enter_context(safetensors_io.open_file(path / place)) for place in tensors}
        yield TensorSource(path, files, {str(place): path / place for place in places if place not in tensors})
