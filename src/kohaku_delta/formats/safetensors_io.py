"""Reading and writing safetensors files.

Reading: `open_file(path)` checks the whole header first; tensors are then read by position, whole or in pieces, never
mapped. Writing: `write(path, specs, produce, metadata)` in one pass, with both hashes computed on the way. The bytes
depend on the contents only; where safetensors itself is deterministic (at most one metadata key) they are the same.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import direct_io, dtypes, safetensors_header
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.formats.safetensors_header import TensorSpec, content_digest

PIECE = 4 << 20  # bytes
Buffer = bytes | memoryview | np.ndarray


@dataclass(frozen=True)
class WriteResult:
    """Of a written file: its size in bytes, its sha256, and its content digest."""

    bytes: int
    sha256: str
    digest: str


@dataclass(frozen=True)
class ExpectedFile:
    """What write() would have written: the header's bytes, sha256 of each tensor, the content digest, and the file's
    sha256 (None with a content_key, whose file takes a second reading).
    """

    header: bytes
    tensors: dict[str, str]
    digest: str
    sha256: str | None


class SafetensorsFile:
    """An open file with a checked header. `specs` in name order; `metadata`; `size` in bytes."""

    def __init__(self, path: Path, reader: direct_io.Reader):
        self.path, self.size, self._reader = path, reader.size, reader
        self.specs, self._offsets, self.metadata = safetensors_header.parse_header(path, reader.descriptor, reader.size)

    def header_bytes(self) -> bytes:
        """Everything before the tensors."""
        return os.pread(self._reader.descriptor, self.size - sum(spec.nbytes for spec in self.specs.values()), 0)

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> memoryview:
        """`length` bytes of the tensor from its byte `start` on (default: all that follow), in new memory."""
        length = self.specs[name].nbytes - start if length is None else length
        found = self._reader.read(self._offsets[name] + start, length)
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
        """The whole tensor's values. Raises UserError for a tensor of whole numbers or of 8-bit floats."""
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
def open_file(path: Path | str) -> Iterator[SafetensorsFile]:
    """Open a safetensors file. Raises UserError, with the path and the reason, for anything that is not a whole and
    well-formed one.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; a safetensors file was expected.")
    try:
        reader = direct_io.Reader(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Check the path, or run the stage that writes it.") from None
    try:
        yield SafetensorsFile(path, reader)
    finally:
        reader.close()


def write(
    path: Path | str,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[list[str]], Iterable[tuple[str, Buffer]]],
    metadata: Mapping[str, str] | None = None,
    sources: Iterable[Path] = (),
    content_key: str | None = None,
) -> WriteResult:
    """Write a file in one pass. `produce(order)` yields (name, bytes) pieces of the tensors in that order; a failure
    leaves no file. content_key: the metadata key of the sha256 of all tensors in the file's order, 0x…, as ModelSpec
    defines it. It is known at the end, so the header is written again, and the file's own sha256 takes a reading.

    Raises UserError if `path` is one of `sources`, ValueError if the pieces are not those of `specs`.
    """
    path = Path(path)
    if path.exists() and any(os.path.samefile(path, source) for source in sources):
        raise UserError(f"{path} is an input and the output at once. Name another file with --out.")
    metadata = dict(metadata or {}) | ({content_key: f"0x{'0' * 64}"} if content_key else {})
    head, order = safetensors_header.build_header(specs, metadata)
    if len(head) - 8 > safetensors_header.MAX_HEADER:
        raise UserError(
            f"{path}: the header would have {len(head) - 8} bytes, and at most {safetensors_header.MAX_HEADER} are "
            "read back. Shorten the metadata."
        )
    whole, hashes = hashlib.sha256(b"" if content_key else head), dict[str, Any]()
    total = len(head) + sum(spec.nbytes for spec in specs.values())
    with atomic_files.atomic_write(path) as file, ThreadPoolExecutor(2) as pool:
        os.posix_fallocate(file.fileno(), 0, total)  # fails now if the disk is too full
        disk = direct_io.Writer(file.fileno(), total)
        disk.write(memoryview(head))
        for data, digest in _ordered_pieces(order, specs, produce, hashes):
            hashing = [pool.submit(each.update, data) for each in (whole, digest)]
            disk.write(data)
            wait(hashing)
        disk.close()
        if content_key:
            head, _ = safetensors_header.build_header(specs, metadata | {content_key: f"0x{whole.hexdigest()}"})
            os.pwrite(file.fileno(), head, 0)
    sha256 = hash_file(path) if content_key else whole.hexdigest()
    return WriteResult(total, sha256, content_digest(specs, _hexdigests(hashes)))


def expected_file(
    specs: Mapping[str, TensorSpec],
    produce: Callable[[list[str]], Iterable[tuple[str, Buffer]]],
    metadata: Mapping[str, str] | None = None,
    content_key: str | None = None,
) -> ExpectedFile:
    """What write() of the same arguments would write, piece by piece and without writing it."""
    metadata = dict(metadata or {}) | ({content_key: f"0x{'0' * 64}"} if content_key else {})
    head, order = safetensors_header.build_header(specs, metadata)
    whole, hashes = hashlib.sha256(b"" if content_key else head), dict[str, Any]()
    with ThreadPoolExecutor(2) as pool:
        for data, digest in _ordered_pieces(order, specs, produce, hashes):
            wait([pool.submit(each.update, data) for each in (whole, digest)])
    if content_key:
        head, _ = safetensors_header.build_header(specs, metadata | {content_key: f"0x{whole.hexdigest()}"})
    tensors = _hexdigests(hashes)
    return ExpectedFile(head, tensors, content_digest(specs, tensors), None if content_key else whole.hexdigest())


def _ordered_pieces(
    order: list[str],
    specs: Mapping[str, TensorSpec],
    produce: Callable[[list[str]], Iterable[tuple[str, Buffer]]],
    hashes: dict[str, Any],
) -> Iterator[tuple[memoryview, Any]]:
    """(bytes, the tensor's hash object in `hashes`). Raises ValueError if the pieces are not those of `specs`."""
    pieces = iter(produce(order))
    for name in order:
        hashes[name], left = hashlib.sha256(), specs[name].nbytes
        while left:
            produced, piece = next(pieces, (None, b""))
            data = (piece.data if isinstance(piece, np.ndarray) else memoryview(piece)).cast("B")
            left -= len(data)
            if produced != name or left < 0:
                raise ValueError(f"{name}: {specs[name].nbytes} bytes were announced; {produced} came")
            yield data, hashes[name]
    for produced, _ in pieces:
        raise ValueError(f"{produced} came after the last tensor")


def _hexdigests(hashes: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def save(
    path: Path | str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtype_of: Mapping[str, str] | None = None,
) -> WriteResult:
    """Write arrays from memory. `dtype_of` names the dtype of arrays for which numpy has none (bfloat16 bits)."""
    names = {dtype: name for name, dtype in dtypes.NUMPY.items() if name not in ("BF16", "F8_E4M3", "F8_E5M2")}
    specs = {
        name: TensorSpec((dtype_of or {}).get(name) or names[array.dtype], array.shape)
        for name, array in tensors.items()
    }
    return write(
        path,
        specs,
        lambda order: ((name, np.ascontiguousarray(tensors[name]).reshape(-1)) for name in order if tensors[name].size),
        metadata,
    )
