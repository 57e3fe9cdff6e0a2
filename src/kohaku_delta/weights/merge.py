"""The merged checkpoint is wa·A + wb·B, tensor by tensor; every number is rounded once per step that params.yaml names,
so it has the same bytes on every host.

Before the sum both parents get the donor's token and position embeddings back (`merge.donor_embeddings`), as in the
release: two halves of one number add up to that number, so these tensors of the result are the donor's, bit for bit.
What is not a sum of weights:
- position_ids and logit_scale are no parameters: they come from the donor, and the parents may lack them. position_ids
  are always 0 … 76: some programs stored them rounded or in another dtype.
- The VAE is summed like everything else; parents that share one VAE (both of the release's do) keep it, bit for bit.
- A tensor that only the donor or only a parent has, or that has another shape, is an error. What lies outside SDXL's
  four parts is left out if `merge.extra_tensors` is `drop`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError, first_lines
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.formats.safetensors_header import TensorSpec, content_digest
from kohaku_delta.formats.safetensors_io import SafetensorsFile, WriteResult
from kohaku_delta.parallel import THREADS, ordered_map
from kohaku_delta.params import Merge
from kohaku_delta.sdxl import checkpoint_checks
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER, POSITION_EMBEDDING, POSITION_IDS, Layout, TensorNameMap

NUMBERS = 1 << 19  # of a tensor computed at a time; a megabyte of fp16, so that the disk reads in large pieces


@dataclass
class MergeResult:
    written: WriteResult
    notes: list[str] = field(default_factory=list)  # what was left out or repaired of the files, a sentence each


def merge(
    donor: Path,
    parents: Mapping[str, Path],
    recipe: Merge,
    out: Path,
    threads: int = 2 * THREADS,
    numbers: int = NUMBERS,
) -> MergeResult:
    """Write the weighted sum of `parents` ({"gamma": path, "beta": path}) to `out`. `threads` (half of them wait for
    the disk) and `numbers` do not change a bit.

    Raises UserError for files that are not whole SDXL checkpoints of one shape, and for sums that are not finite.
    """
    if set(recipe.weights) != set(parents):
        raise UserError(f"merge.weights names {', '.join(recipe.weights)}; the parents are {', '.join(parents)}.")
    with ExitStack() as stack:
        base = stack.enter_context(safetensors_io.open_file(donor))
        files = [stack.enter_context(safetensors_io.open_file(parents[name])) for name in recipe.weights]
        kept, notes = _check(base, files, recipe)
        positions = _repaired_position_ids(base, notes)
        specs = {
            name: spec if name in NO_PARAMETER else TensorSpec(dtypes.NAMES[recipe.output_dtype], spec.shape)
            for name, spec in kept.items()
        }
        if positions is not None:
            specs[POSITION_IDS] = TensorSpec("I64", positions.shape)

        def values(file: SafetensorsFile, name: str, start: int, count: int) -> np.ndarray:
            dtype = file.specs[name].dtype
            size = dtypes.BYTES[dtype]
            stored = np.frombuffer(file.read_bytes(name, start * size, count * size), dtypes.NUMPY[dtype])
            return dtypes.to_float32(stored, dtype)

        def sum_chunk(chunk: tuple[str, int, int]) -> tuple[str, safetensors_io.Buffer]:
            name, start, count = chunk
            if name == POSITION_IDS and positions is not None:
                return name, positions
            if name in NO_PARAMETER:
                return name, base.read_bytes(name)
            dtype = specs[name].dtype
            sources = [base if name in recipe.donor_embeddings else file for file in files]
            parts = [values(file, name, start, count) for file in sources]
            stored = dtypes.from_float32(
                weighted_sum(parts, list(recipe.weights.values()), recipe.compute_dtype), dtype
            )
            if not dtypes.all_finite(stored, dtype):
                raise UserError(
                    f"{name}: the sum holds NaN or infinity. One of {_join([donor, *parents.values()])} is damaged, or "
                    f"its values are too large for {recipe.output_dtype}."
                )
            return name, stored

        def produce(order: list[str]) -> Iterator[tuple[str, safetensors_io.Buffer]]:
            return ordered_map(sum_chunk, _output_chunks(order, specs, numbers), threads)

        written = safetensors_io.write(out, specs, produce, _metadata(recipe), sources=[donor, *parents.values()])
        return MergeResult(written, notes)


def weighted_sum(values: list[np.ndarray], weights: list[float], compute_dtype: str) -> np.ndarray:
    """Σ weight·value in the given order, as float32; every product and every sum is rounded to `compute_dtype`
    (float32 | float16). Overwrites `values`.
    """
    dtype = np.dtype(compute_dtype)
    total: np.ndarray | None = None
    with np.errstate(over="ignore", invalid="ignore"):
        for value, weight in zip(values, weights, strict=True):
            value = value.astype(dtype, copy=False)
            product = np.multiply(value, dtype.type(weight), out=value)
            total = product if total is None else np.add(total, product, out=total)
    assert total is not None
    return total.astype(np.float32, copy=False)


def copy_published_base(published: Path, sha256: str | None, out: Path, drop_extra: bool = False) -> MergeResult:
    """Copy the published delta base, with broken position_ids repaired, and without extra tensors if `drop_extra`;
    unchanged if there is nothing of both. Raises UserError if it is not a whole SDXL checkpoint, holds NaN or infinity,
    or if a `sha256` is given and differs.
    """
    notes: list[str] = []
    with safetensors_io.open_file(published) as file:
        kept = _usable(file, drop_extra, notes)
        names = TensorNameMap(Layout.of(kept))
        _raise_mismatch(published, names.missing(kept), names.unknown(kept), [])
        positions = _repaired_position_ids(file, notes)
        digest = content_digest(file.specs, {name: _finite_sha256(file, name) for name in file.specs})
        if not notes:
            return MergeResult(_copy(published, sha256, out, digest))
        if sha256:
            _require_sha256(published, hash_file(published), sha256)
        specs = kept if positions is None else kept | {POSITION_IDS: TensorSpec("I64", positions.shape)}

        def produce(order: list[str]) -> Iterator[tuple[str, safetensors_io.Buffer]]:
            for name in order:
                if name == POSITION_IDS and positions is not None:
                    yield name, positions
                else:
                    yield from ((name, piece) for piece in file.iter_chunks(name))

        return MergeResult(safetensors_io.write(out, specs, produce, file.metadata, sources=[published]), notes)


def _copy(published: Path, sha256: str | None, out: Path, digest: str) -> WriteResult:
    whole, size = hashlib.sha256(), 0
    with open(published, "rb") as source, atomic_files.atomic_write(out) as target:
        while piece := source.read(safetensors_io.PIECE):
            whole.update(piece)
            size += target.write(piece)
        if sha256:
            _require_sha256(published, whole.hexdigest(), sha256)
    return WriteResult(size, whole.hexdigest(), digest)


def _require_sha256(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{path} has the sha256 {found}; {expected} was expected. Fetch it again.")


def _usable(file: SafetensorsFile, drop_extra: bool, notes: list[str]) -> dict[str, TensorSpec]:
    """The tensors of a file that are part of SDXL; a note names those that are not, if they may be left out."""
    checkpoint_checks.require_epsilon(file)
    checkpoint_checks.require_sdxl_weights(file)
    extra = checkpoint_checks.extra_tensors(file, drop_extra, "merge.extra_tensors: drop in params.yaml")
    if extra:
        notes.append(f"left out of {file.path}: {checkpoint_checks.list_names(extra)}")
    return {name: spec for name, spec in file.specs.items() if name not in set(extra)}


def _repaired_position_ids(file: SafetensorsFile, notes: list[str]) -> np.ndarray | None:
    """0 … 76, int64 (1, 77), if the file has something else under that name; None if there is nothing to repair."""
    spec = file.specs.get(POSITION_IDS)
    if spec is None or POSITION_EMBEDDING not in file.specs:
        return None
    count = file.specs[POSITION_EMBEDDING].shape[0]
    right = np.arange(count, dtype=np.int64)
    is_whole = spec.dtype == "I64" and spec.shape in ((1, count), (count,))
    if is_whole and np.array_equal(file.read(POSITION_IDS).reshape(-1), right):
        return None
    notes.append(f"{file.path}: {POSITION_IDS} is not 0 … {count - 1} as whole numbers, and was repaired")
    return right[None]


def _finite_sha256(file: SafetensorsFile, name: str) -> str:
    """The sha256 of a tensor's bytes. Raises UserError for NaN and infinity."""
    digest, dtype = hashlib.sha256(), file.specs[name].dtype
    for piece in file.iter_chunks(name):
        digest.update(piece)
        if not dtypes.all_finite(np.frombuffer(piece, dtypes.NUMPY[dtype]), dtype):
            raise UserError(f"{file.path}: {name} holds NaN or infinity: the file is damaged. Fetch it again.")
    return digest.hexdigest()


def _output_chunks(order: list[str], specs: Mapping[str, TensorSpec], numbers: int) -> Iterator[tuple[str, int, int]]:
    """(name, first number, count) of every piece of the output."""
    for name in order:
        count = specs[name].count
        step = max(count, 1) if name in NO_PARAMETER else numbers
        yield from ((name, start, min(step, count - start)) for start in range(0, count, step))


def _check(
    base: SafetensorsFile, files: list[SafetensorsFile], recipe: Merge
) -> tuple[dict[str, TensorSpec], list[str]]:
    """(the donor's tensors that go into the result, notes). Raises UserError for files that cannot be added up."""
    notes: list[str] = []
    kept = {file: _usable(file, recipe.extra_tensors == "drop", notes) for file in (base, *files)}
    names = TensorNameMap(Layout.of(kept[base]))
    _raise_mismatch(base.path, names.missing(kept[base]), names.unknown(kept[base]), [])
    parameters = {name: spec for name, spec in kept[base].items() if name not in NO_PARAMETER}
    for file in (base, *files):
        own = {name: spec for name, spec in kept[file].items() if name not in NO_PARAMETER}
        other = [
            f"{name} is {own[name].dtype} {list(own[name].shape)}, not a float of {list(spec.shape)}"
            for name, spec in parameters.items()
            if name in own and (own[name].shape != spec.shape or own[name].dtype not in dtypes.FLOATS)
        ]
        _raise_mismatch(file.path, sorted(set(parameters) - set(own)), sorted(set(own) - set(parameters)), other)
    unknown = [name for name in recipe.donor_embeddings if name not in parameters]
    if unknown:
        raise UserError(f"merge.donor_embeddings names {_join(unknown)}, which is not a tensor of {base.path}.")
    return kept[base], notes


def _raise_mismatch(path: Path, missing: list[str], unknown: list[str], other: list[str]) -> None:
    faults = [f"missing: {name}" for name in missing] + [f"not known: {name}" for name in unknown]
    faults += [f"other: {line}" for line in other]
    if faults:
        raise UserError(f"{path} is not a whole SDXL checkpoint of the donor's shapes:", *first_lines(faults))


def _join(things) -> str:
    return ", ".join(map(str, things))


def _metadata(recipe: Merge) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Kohaku XL Delta, base",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": ", ".join(f"{weight:g} {parent}" for parent, weight in recipe.weights.items()),
    }
