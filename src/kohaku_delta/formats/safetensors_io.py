"""Invariant: a safetensors file is read only after its header was checked whole, and written only in the one order that
its contents decide.

Reading: `open_file(path)` checks the header; tensors then come whole or in pieces, by position (pread), never mapped.
Writing: `write(path, specs, produce, metadata)` in one pass, with a thread for each of the two hashes. The bytes depend
on contents only; where safetensors itself is deterministic (at most one metadata key) it writes the same ones.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import direct_io, dtypes, safetensors_header
from kohaku_delta.formats.safetensors_header import TensorSpec, content_digest

PIECE = 4 << 20
Buffer = bytes | memoryview | np.ndarray


@dataclass(frozen=True)
class WriteResult:
    """What a file turned out to be: its size, its sha256, and its content digest."""

    bytes: int
    sha256: str
    digest: str


class SafetensorsFile:
    """An open, checked file. `specs` in name order; `metadata`; `size` in bytes."""

    def __init__(
        self,
        path: Path,
        reader: direct_io.Reader,
        specs: dict[str, TensorSpec],
        offsets: dict[str, int],
        metadata: dict[str, str],
    ):
        self.path, self.specs, self.metadata, self.size = path, specs, metadata, reader.size
        self._reader, self._offsets = reader, offsets

    def header_bytes(self) -> bytes:
        """All that stands before the tensors."""
        return os.pread(self._reader.descriptor, self.size - sum(spec.nbytes for spec in self.specs.values()), 0)

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, into: np.ndarray | None = None
    ) -> memoryview:
        """`length` of the tensor's bytes from its byte `start` (all that follow, when not given); somewhere in `into`
        (direct.memory of that length), if given.
        """
        length = self.specs[name].nbytes - start if length is None else length
        found = self._reader.read(
            self._offsets[name] + start, length, direct_io.aligned_buffer(length) if into is None else into
        )
        if len(found) < length:
            raise UserError(f"{self.path} became shorter while it was read. Is another program writing it?")
        return found.toreadonly()

    def iter_chunks(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """The tensor's bytes, in order, `size` at a time."""
        total = self.specs[name].nbytes
        yield from (self.read_bytes(name, start, min(size, total - start)) for start in range(0, total, size))

    def read(self, name: str) -> np.ndarray:
        """The whole tensor as stored (bfloat16 as uint16 bits), read-only."""
        spec = self.specs[name]
        return np.frombuffer(self.read_bytes(name), dtypes.NUMPY[spec.dtype]).reshape(spec.shape)

    def float32(self, name: str) -> np.ndarray:
        """The whole tensor's values."""
        spec = self.specs[name]
        if spec.dtype not in dtypes.FLOATS:
            raise UserError(
                f"{self.path}: {name} is {spec.dtype}, which cannot be computed with; F16, BF16, F32 and F64 can."
            )
        return dtypes.to_float32(self.read(name), spec.dtype)

    def digest(self) -> str:
        """The content digest; reads the whole file."""
        hashes = {}
        for name in self.specs:
            tensor = hashlib.sha256()
            for piece in self.iter_chunks(name):
                tensor.update(piece)
            hashes[name] = tensor.hexdigest()
        return content_digest(self.specs, hashes)


@contextmanager
def open_file(path) -> Iterator[SafetensorsFile]:
    """A checked File. Refuses, with the file's name and the reason, whatever is not a whole and well-formed safetensors
    file.
    """
    path = Path(path)
    try:
        reader = direct_io.Reader(path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there. Check the path, or run the stage that writes it.") from None
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; a safetensors file was expected.")
        specs, offsets, metadata = safetensors_header.parse_header(path, reader.descriptor, reader.size)
        yield SafetensorsFile(path, reader, specs, offsets, metadata)
    finally:
        reader.close()


def write(
    path,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[list[str]], Iterable[tuple[str, Buffer]]],
    metadata: Mapping[str, str] | None = None,
    sources: Iterable[Path] = (),
) -> WriteResult:
    """Writes the file in one pass; `produce(order)` gives (name, bytes) pieces, the tensors in that order. Nothing is
    left when it raises.

    A piece is done with when the next one is asked for. Refuses to write over one of `sources`.
    """
    path = Path(path)
    for source in sources:
        if path.exists() and os.path.samefile(path, source):
            raise UserError(f"{path} is an input and the output at once. Name another file with --out.")
    head, order = safetensors_header.build_header(specs, metadata or {})
    if len(head) - 8 > safetensors_header.LIMIT:
        raise UserError(
            f"{path}: the header would have {len(head) - 8} bytes, more than the {safetensors_header.LIMIT} that are read back. Shorten the metadata."
        )
    whole, hashes = hashlib.sha256(head), {}
    total = len(head) + sum(spec.nbytes for spec in specs.values())
    with atomic_files.atomic_write(path) as file, ThreadPoolExecutor(2) as pool:
        os.posix_fallocate(file.fileno(), 0, total)  # a disk that is too full is known now
        disk = direct_io.Writer(file.fileno(), total)
        disk.write(memoryview(head))
        pieces = iter(produce(order))
        for name in order:
            tensor, left = hashlib.sha256(), specs[name].nbytes
            while left:
                of, piece = next(pieces, (None, b""))
                data = memoryview(piece).cast("B")
                left -= len(data)
                if of != name or left < 0:
                    raise ValueError(f"{name}: its {specs[name].nbytes} bytes were announced, and {of} came")
                hashed = [pool.submit(each.update, data) for each in (whole, tensor)]
                disk.write(data)
                wait(hashed)
            hashes[name] = tensor.hexdigest()
        for of, _ in pieces:
            raise ValueError(f"{of} came after the last tensor")
        disk.close()
    return WriteResult(total, whole.hexdigest(), content_digest(specs, hashes))


def save(
    path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtype_of: Mapping[str, str] | None = None,
) -> WriteResult:
    """Writes arrays held in memory. `dtype_of` names the dtype of arrays that numpy cannot (bfloat16 bits)."""
    known = {
        dtype: name for name, dtype in reversed(dtypes.NUMPY.items()) if name not in ("BF16", "F8_E4M3", "F8_E5M2")
    }
    specs = {
        name: TensorSpec((dtype_of or {}).get(name) or known[array.dtype], array.shape)
        for name, array in tensors.items()
    }
    return write(
        path,
        specs,
        lambda order: ((name, np.ascontiguousarray(tensors[name]).reshape(-1)) for name in order if tensors[name].size),
        metadata,
    )
