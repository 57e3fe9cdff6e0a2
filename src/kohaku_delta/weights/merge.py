"""The merged checkpoint is wa·A + wb·B, tensor by tensor; every number is rounded once per step that params.yaml names,
so it has the same bytes on every host.

Before the sum both parents get the donor's token and position embeddings back (`merge.donor_embeddings`), as in the
release: two halves of one number add up to that number, so these tensors of the result are the donor's, bit for bit.
What is not a sum of weights:
- position_ids and logit_scale are no parameters: they come from the donor unchanged, and the parents may lack them.
- The VAE is summed like everything else; parents that share one VAE (both of the release's do) keep it, bit for bit.
- A tensor that only the donor or only a parent has, or that has another shape, is an error.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError, first_lines
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec
from kohaku_delta.formats.safetensors_io import SafetensorsFile, WriteResult
from kohaku_delta.parallel import THREADS, ordered_map
from kohaku_delta.params import Merge
from kohaku_delta.sdxl.tensor_names import NO_PARAMETER, Layout, TensorNameMap

NUMBERS = 1 << 19  # of a tensor computed at a time; a megabyte of fp16, so that the disk reads in large pieces


def merge(
    donor: Path,
    parents: Mapping[str, Path],
    recipe: Merge,
    out: Path,
    threads: int = 2 * THREADS,
    numbers: int = NUMBERS,
) -> WriteResult:
    """Write the weighted sum of `parents` ({"gamma": path, "beta": path}) to `out`. `threads` (half of them wait for
    the disk) and `numbers` do not change a bit.

    Raises UserError for files that are not whole SDXL checkpoints of one shape, and for sums that are not finite.
    """
    if set(recipe.weights) != set(parents):
        raise UserError(f"merge.weights names {', '.join(recipe.weights)}; the parents are {', '.join(parents)}.")
    with ExitStack() as stack:
        base = stack.enter_context(safetensors_io.open_file(donor))
        files = [stack.enter_context(safetensors_io.open_file(parents[name])) for name in recipe.weights]
        _check(base, files, recipe)
        specs = {
            name: spec if name in NO_PARAMETER else TensorSpec(dtypes.NAMES[recipe.output_dtype], spec.shape)
            for name, spec in base.specs.items()
        }

        def values(file: SafetensorsFile, name: str, start: int, count: int) -> np.ndarray:
            dtype = file.specs[name].dtype
            size = dtypes.BYTES[dtype]
            stored = np.frombuffer(file.read_bytes(name, start * size, count * size), dtypes.NUMPY[dtype])
            return dtypes.to_float32(stored, dtype)

        def sum_chunk(chunk: tuple[str, int, int]) -> tuple[str, safetensors_io.Buffer]:
            name, start, count = chunk
            if name in NO_PARAMETER:
                return name, base.read_bytes(name)
            dtype = specs[name].dtype
            sources = [base if name in recipe.donor_embeddings else file for file in files]
            parts = [values(file, name, start, count) for file in sources]
            stored = dtypes.from_float32(
                weighted_sum(parts, list(recipe.weights.values()), recipe.compute_dtype), dtype
            )
            if not dtypes.finite(stored, dtype):
                raise UserError(
                    f"{name}: the sum holds NaN or infinity. One of {_join([donor, *parents.values()])} is damaged, or "
                    f"its values are too large for {recipe.output_dtype}."
                )
            return name, stored

        def produce(order: list[str]) -> Iterator[tuple[str, safetensors_io.Buffer]]:
            return ordered_map(sum_chunk, _output_chunks(order, specs, numbers), threads)

        return safetensors_io.write(out, specs, produce, _metadata(recipe), sources=[donor, *parents.values()])


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


def copy_published_base(published: Path, sha256: str | None, out: Path) -> WriteResult:
    """Copy the published delta base unchanged. Raises UserError if it is not a whole SDXL checkpoint, or if a `sha256`
    is given and differs.
    """
    whole = hashlib.sha256()
    with safetensors_io.open_file(published) as file:
        names = TensorNameMap(Layout.of(file.specs))
        _raise_mismatch(published, names.missing(file.specs), names.unknown(file.specs), [])
        digest, size = file.digest(), file.size
    with open(published, "rb") as source, atomic_files.atomic_write(out) as target:
        while piece := source.read(safetensors_io.PIECE):
            whole.update(piece)
            target.write(piece)
        if sha256 and whole.hexdigest() != sha256:
            raise UserError(f"{published} has the sha256 {whole.hexdigest()}; {sha256} was expected. Fetch it again.")
    return WriteResult(size, whole.hexdigest(), digest)


def _output_chunks(order: list[str], specs: Mapping[str, TensorSpec], numbers: int) -> Iterator[tuple[str, int, int]]:
    """(name, first number, count) of every piece of the output."""
    for name in order:
        count = specs[name].count
        step = max(count, 1) if name in NO_PARAMETER else numbers
        yield from ((name, start, min(step, count - start)) for start in range(0, count, step))


def _check(base: SafetensorsFile, files: list[SafetensorsFile], recipe: Merge) -> None:
    try:
        names = TensorNameMap(Layout.of(base.specs))
    except UserError as refusal:
        raise UserError(f"{base.path}: {refusal.message}") from None
    _raise_mismatch(base.path, names.missing(base.specs), names.unknown(base.specs), [])
    parameters = {name: spec for name, spec in base.specs.items() if name not in NO_PARAMETER}
    for file in (base, *files):
        own = {name: spec for name, spec in file.specs.items() if name not in NO_PARAMETER}
        other = [
            f"{name} is {own[name].dtype} {list(own[name].shape)}, not a float of {list(spec.shape)}"
            for name, spec in parameters.items()
            if name in own and (own[name].shape != spec.shape or own[name].dtype not in dtypes.FLOATS)
        ]
        _raise_mismatch(file.path, sorted(set(parameters) - set(own)), sorted(set(own) - set(parameters)), other)
    unknown = [name for name in recipe.donor_embeddings if name not in parameters]
    if unknown:
        raise UserError(f"merge.donor_embeddings names {_join(unknown)}, which is no tensor of {base.path}.")


def _raise_mismatch(path: Path, missing: list[str], unknown: list[str], other: list[str]) -> None:
    faults = [f"missing: {name}" for name in missing] + [f"not known: {name}" for name in unknown]
    faults += [f"other: {line}" for line in other]
    if faults:
        raise UserError(f"{path} is not a whole SDXL checkpoint of the donor's shapes:" + first_lines(faults))


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
