"""A checkpoint, a LoKr file or a diffusers folder as named tensors that are read in pieces.

A LoKr file has two views: the tensors that it stores, and the differences that it makes, scale · kron(w1, w2), of which
only the requested rows are in memory. A checkpoint can also be viewed as the folder that it would be exported to.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.safetensors_io import SafetensorsFile
from kohaku_delta.sdxl.diffusers_layout import PLACES, diffusers_name, to_diffusers
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER, SDXL, Layout, TensorNameMap
from kohaku_delta.weights import lokr_format
from kohaku_delta.weights.weight_delta import delta_shape, load_delta

LORA_PREFIXES = ("lora_", "lycoris_", lokr_format.EMBEDDING)
MAX_DIFFERENCE = 1 << 28  # numbers of a layer; SDXL's largest has 38 million
COMPONENTS = tuple(dict.fromkeys(Path(place).parts[0] for place in PLACES.values()))


@cache
def _lora_names() -> dict[str, str]:
    """A module's name in a LoKr file, as any trainer writes it → as kohya's do. Smaller models have no other names."""
    return {name: entry.lora or name for name, (entry, _) in TensorNameMap(SDXL).by_lora().items()}


def kohya_name(name: str) -> str:
    """The name of a LoKr file's module or tensor as kohya's trainers write it; the name itself if none is known."""
    module, dot, suffix = name.partition(".")
    return _lora_names().get(module, module) + dot + suffix


ReadPart = Callable[[int, int], np.ndarray]  # (start, stop) → these numbers of the flat tensor, as stored


@dataclass(frozen=True)
class LazyTensor:
    """open() gives a reader whose start and stop are multiples of `grain`, or the end."""

    dtype: str
    shape: tuple[int, ...]
    open: Callable[[], ReadPart]
    grain: int = 1

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TensorSource:
    """files: safetensors files by their place under `path`, "" for a single file; others: what else a folder holds."""

    path: Path
    files: Mapping[str, SafetensorsFile]
    others: Mapping[str, Path]

    @property
    def is_folder(self) -> bool:
        return "" not in self.files

    @property
    def is_lokr(self) -> bool:
        names = () if self.is_folder else self.files[""].specs
        return bool(names) and all(name.startswith(LORA_PREFIXES) for name in names)

    def stored(self) -> dict[str, LazyTensor]:
        """The tensors under the names in the file; of a folder, under component/name."""
        tensors: dict[str, LazyTensor] = {}
        for place, file in self.files.items():
            component = f"{Path(place).parts[0]}/" if place else ""
            for name in file.specs:
                key = component + (name.removeprefix("text_model.") if component.startswith("text_encoder") else name)
                key = kohya_name(key) if self.is_lokr else key
                if key in tensors and self.is_lokr:
                    raise UserError(f"{self.path} has two names of one layer, {name} and {key}. The file is damaged.")
                if key in tensors:
                    raise UserError(
                        f"{self.path} has two tensors {key}, one of them in {place}: keep one variant of each "
                        "component in the folder."
                    )
                tensors[key] = _stored(file, name)
        return tensors

    def differences(self) -> dict[str, LazyTensor]:
        """What a LoKr file adds to each parameter of each module, in float32 (products of two float16 numbers are exact
        in it).
        """
        file = self.files[""]
        tensors = {name: _stored(file, name) for name in lokr_format.embeddings(file)}
        for module, (kind, parts) in lokr_format.group_by_module(file).items():
            for name, bias in (("weight", False), ("bias", True)):
                if (shape := delta_shape(file, module, kind, parts, bias)) is not None:
                    tensors[f"{kohya_name(module)}.{name}"] = _difference(file, module, kind, parts, shape, bias)
            if "dora_scale" in parts:
                tensors[f"{kohya_name(module)}.dora_scale"] = _stored(file, parts["dora_scale"])
        return tensors

    def as_folder(self) -> dict[str, LazyTensor]:
        """A checkpoint's tensors under the names and in the shapes of a diffusers folder."""
        file, tensors = self.files[""], {}
        for entry in TensorNameMap(Layout.of(file.specs)).entries:
            if entry.key not in file.specs or entry.key in NO_PARAMETER:
                continue
            spec = file.specs[entry.key]
            shape = entry.shape_in_module(spec.shape)
            if shape is None:
                raise UserError(f"{self.path}: {entry.key} has the shape {list(spec.shape)}, which no SDXL model has.")
            key = f"{Path(PLACES[entry.part]).parts[0]}/{diffusers_name(entry).removeprefix('text_model.')}"
            if entry.form == "transposed":

                def open_transposed(entry=entry) -> ReadPart:
                    array = to_diffusers(entry, file.read(entry.key))
                    return lambda start, stop: array[start:stop]

                tensors[key] = LazyTensor(spec.dtype, shape, open_transposed)
            else:
                tensors[key] = _stored(file, entry.key, shape, entry.third * prod(shape))
        return tensors


def _stored(file: SafetensorsFile, name: str, shape: tuple[int, ...] | None = None, first: int = 0) -> LazyTensor:
    """A tensor of a file; with `shape`, the part of it that begins at the number `first`."""
    spec = file.specs[name]
    size, dtype = dtypes.BYTES[spec.dtype], dtypes.NUMPY[spec.dtype]

    def read(start: int, stop: int) -> np.ndarray:
        return np.frombuffer(file.read_bytes(name, (first + start) * size, (stop - start) * size), dtype)

    return LazyTensor(spec.dtype, spec.shape if shape is None else shape, lambda: read)


def _difference(
    file: SafetensorsFile, module: str, kind: str, parts: dict[str, str], shape: tuple[int, ...], bias: bool
) -> LazyTensor:
    row = prod(shape[1:])
    if shape[0] * row > MAX_DIFFERENCE:
        raise UserError(
            f"{file.path}: {module} would change {shape[0] * row:,} numbers, more than any layer of SDXL has."
        )

    def open_delta() -> ReadPart:
        delta = load_delta(file, module, kind, parts, shape, bias)
        return lambda start, stop: delta.rows(start // row, -(-stop // row)).reshape(-1)

    # w2 has a convolution's kernel as one axis or as two: two files only share rows and columns
    return LazyTensor("F32", (shape[0], row) if len(shape) > 1 else shape, open_delta, row)


@contextmanager
def open_tensor_source(path: Path) -> Iterator[TensorSource]:
    """Opens a safetensors file, or a folder of components with such files. Raises UserError for anything else."""
    path = Path(path)
    with ExitStack() as stack:
        if not path.is_dir():
            yield TensorSource(path, {"": stack.enter_context(safetensors_io.open_file(path))}, {})
            return
        places = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        places = [place for place in places if not any(part.startswith(".") for part in place.parts)]
        tensors = [place for place in places if place.suffix == ".safetensors" and place.parts[0] in COMPONENTS]
        if not tensors:
            raise UserError(
                f"{path} is a folder without {', '.join(COMPONENTS)}: a diffusers folder, or one safetensors "
                "file, was expected."
            )
        files = {str(place): stack.enter_context(safetensors_io.open_file(path / place)) for place in tensors}
        yield TensorSource(path, files, {str(place): path / place for place in places if place not in tensors})
