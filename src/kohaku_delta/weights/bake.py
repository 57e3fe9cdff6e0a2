"""Invariant: a trained tensor becomes W + scale·ΔW, computed in fp32 and rounded once; every other tensor keeps its
bits.

The LoKr must have been trained on this very base: its `ss_base_digest` is compared with the base's content digest,
which is computed from the bytes on their way. With `force` that is left to the user, and entries that match no tensor
are left out.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.buffer_pool import BufferPool
from kohaku_delta.formats.safetensors_header import content_digest
from kohaku_delta.formats.safetensors_io import SafetensorsFile, WriteResult
from kohaku_delta.parallel import THREADS, ordered_map
from kohaku_delta.params import Bake
from kohaku_delta.sdxl.tensor_names import Layout, TensorMapping, TensorNameMap
from kohaku_delta.weights import lokr_format
from kohaku_delta.weights.weight_delta import DenseDelta, KronDelta, load_delta

NUMBERS = 1 << 19  # of a tensor computed at a time
SHOWN = 10
EPSILON = np.finfo(np.float32).eps


@dataclass
class WeightUpdate:
    """What one entry of the LoKr file does to some rows of one tensor."""

    entry: TensorMapping
    module: str
    kind: str
    parts: dict[str, str]
    shape: tuple[int, ...]  # of the module's parameter
    first: int = 0  # its first row in the tensor
    delta: DenseDelta | KronDelta | None = None
    norms: np.ndarray | None = None  # DoRA by columns: ‖W + ΔW‖ of each

    @property
    def bias(self) -> bool:
        return self.entry.path.endswith(".bias")


@dataclass
class BakeResult:
    written: WriteResult
    tensors: int  # that were changed
    left_out: list[str] = field(default_factory=list)  # modules that matched nothing (force)


def bake(
    base: Path,
    lokr_file: Path,
    recipe: Bake,
    out: Path,
    force: bool = False,
    threads: int = 2 * THREADS,
    numbers: int = NUMBERS,
) -> BakeResult:
    """Writes base + scale · LoKr to `out`. Neither `threads` (half of them wait for the disk) nor `numbers` moves a
    bit.

    Refuses another base than the LoKr's, entries without a tensor, other shapes, and values that are not finite.
    """
    with safetensors_io.open_file(base) as model, safetensors_io.open_file(lokr_file) as trained:
        changes, left_out = plan_updates(model, trained, force)
        for _ in ordered_map(lambda change: load_update(model, trained, change), sum(changes.values(), []), threads):
            pass  # every entry is read and checked before the first byte is written
        wanted = lokr_format.base_digest(trained)
        if wanted is None and not force:
            raise UserError(
                f"{lokr_file} does not say which base it was trained on ({lokr_format.BASE_DIGEST}). If you know that it was {base}, say --force."
            )
        scale = np.float32(recipe.scale)

        spare = BufferPool(numbers * 4)

        def work(
            item: tuple[str, int, int, list[WeightUpdate]],
        ) -> tuple[str, np.ndarray, memoryview, safetensors_io.Buffer]:
            name, start, stop, here = item
            if not here:
                memory = spare.acquire(stop - start)
                raw = model.read_bytes(name, start, stop - start, memory)
                return name, memory, raw, raw
            dtype, shape = model.specs[name].dtype, model.specs[name].shape
            row, size = prod(shape[1:]), dtypes.BYTES[dtype]
            count = (stop - start) * row
            memory, wide, room, narrow = (spare.acquire(count * max(size, 4)) for _ in range(4))
            raw = model.read_bytes(name, start * row * size, count * size, memory)
            values = dtypes.to_float32(
                np.frombuffer(raw, dtypes.NUMPY[dtype]), dtype, wide[: count * 4].view(np.float32)
            )
            for change in here:
                apply_update(
                    values.reshape(stop - start, *shape[1:]),
                    start,
                    change,
                    scale,
                    trained,
                    room[: count * 4].view(np.float32),
                )
            stored = dtypes.from_float32(values, dtype, narrow[: count * size].view(dtypes.NUMPY[dtype]))
            spare.release(wide)
            spare.release(room)
            if not dtypes.finite(stored, dtype):
                raise UserError(
                    f"{name} would hold NaN or infinity as {dtype}: {base} is damaged, or {lokr_file} does not belong to it."
                )
            return name, memory, raw, stored

        def produce(order: list[str]) -> Iterator[tuple[str, safetensors_io.Buffer]]:
            hashes = {name: hashlib.sha256() for name in order}
            with ThreadPoolExecutor(1) as pool:
                for name, memory, raw, piece in ordered_map(
                    work, _output_chunks(order, model, trained, changes, scale, numbers), threads
                ):
                    hashed = pool.submit(hashes[name].update, raw)
                    yield name, piece
                    hashed.result()
                    spare.release(memory)
                    if piece is not raw:
                        spare.release(piece)
            digest = content_digest(model.specs, {name: each.hexdigest() for name, each in hashes.items()})
            if wanted not in (None, digest) and not force:
                raise UserError(
                    f"{lokr_file} was trained on another base: its {lokr_format.BASE_DIGEST} is {wanted[:16]}…, and {base} has the content digest {digest[:16]}…. "
                    "On a wrong base it gives garbage. Name the base that it was trained on with --base, or say --force."
                )

        metadata = _metadata(model, recipe)
        return BakeResult(
            safetensors_io.write(out, model.specs, produce, metadata, sources=[base, lokr_file]), len(changes), left_out
        )


def plan_updates(
    model: SafetensorsFile, trained: SafetensorsFile, force: bool
) -> tuple[dict[str, list[WeightUpdate]], list[str]]:
    """tensor name → the changes made to it, and the modules left out."""
    try:
        table = TensorNameMap(Layout.of(model.specs)).by_lora()
    except UserError as refusal:
        raise UserError(f"{model.path}: {refusal.message}") from None
    changes: dict[str, list[WeightUpdate]] = {}
    left_out, seen = [], {}
    for module, (kind, parts) in lokr_format.group_by_module(trained).items():
        if module not in table or table[module][0].key not in model.specs:
            left_out.append(module)
            continue
        weight, bias = table[module]
        if seen.setdefault(weight, module) != module:
            raise UserError(
                f"{trained.path}: {module} and {seen[weight]} are two names of one layer. The file is damaged."
            )
        biased = kind != "lokr" and bool({"b_norm", "diff_b"} & set(parts))
        for entry in (weight, bias)[0 if kind == "lokr" or {"w_norm", "diff"} & set(parts) else 1 : 1 + biased]:
            if entry is None or entry.key not in model.specs:
                raise UserError(f"{trained.path}: {module} changes a bias, and {model.path} has none there.")
            shape = entry.shape_in_module(model.specs[entry.key].shape)
            if shape is None or not shape or model.specs[entry.key].dtype not in dtypes.FLOATS:
                raise UserError(
                    f"{model.path}: {entry.key} is {model.specs[entry.key].dtype} {list(model.specs[entry.key].shape)}, which cannot be baked onto."
                )
            changes.setdefault(entry.key, []).append(
                WeightUpdate(entry, module, kind, parts, shape, shape[0] * entry.third)
            )
    if left_out and not force:
        rest = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        raise UserError(
            f"{trained.path}: {', '.join(left_out[:SHOWN])}{rest} match no tensor of {model.path}. "
            "It was trained on a model of another kind; say --force to leave them out."
        )
    return changes, left_out


def apply_update(
    values: np.ndarray, start: int, change: WeightUpdate, scale: np.float32, trained: SafetensorsFile, room: np.ndarray
) -> None:
    """Applies a change to the rows of a tensor from row `start` on, in place; `room`: as many float32 numbers, to
    compute in.
    """
    first, last = max(start, change.first), min(start + len(values), change.first + change.shape[0])
    if first >= last:
        return
    part = values[first - start : last - start]
    delta = change.delta.rows(first - change.first, last - change.first, room).reshape(part.shape)
    if "dora_scale" not in change.parts or change.bias:
        part += delta if scale == 1 else delta * scale
        return
    # W' = (W + ΔW) · (1 + scale · (m / ‖W + ΔW‖ − 1)): the norm of each row, or of each column
    part += delta
    magnitude = trained.float32(change.parts["dora_scale"]).reshape(-1)
    if change.norms is None:
        rows = part.reshape(len(part), -1)
        factor = magnitude[first - change.first : last - change.first] / (
            np.sqrt(np.einsum("ij,ij->i", rows, rows)) + EPSILON
        )
        factor = factor.reshape(-1, *[1] * (part.ndim - 1))
    else:
        factor = (magnitude / change.norms).reshape(1, -1, *[1] * (part.ndim - 2))
    part *= 1 + scale * (factor - 1)


def load_update(model: SafetensorsFile, trained: SafetensorsFile, change: WeightUpdate) -> WeightUpdate:
    """The change with its difference in memory; refuses parts that are not whole, finite and of the tensor's shape."""
    change = WeightUpdate(change.entry, change.module, change.kind, change.parts, change.shape, change.first)
    change.delta = load_delta(trained, change.module, change.kind, change.parts, change.shape, change.bias)
    if change.entry.form == "transposed":
        turned = change.delta.rows(0, change.shape[0]).T
        change.delta, change.shape = DenseDelta(turned, turned.shape), turned.shape
    if "dora_scale" in change.parts and not change.bias:
        scale_shape = trained.specs[change.parts["dora_scale"]].shape
        by_rows = prod(scale_shape) == change.shape[0] and scale_shape[:1] == (change.shape[0],)
        by_columns = (
            len(change.shape) > 1 and prod(scale_shape) == change.shape[1] and scale_shape[1:2] == (change.shape[1],)
        )
        if change.entry.form == "transposed" or not (by_rows or by_columns):
            raise UserError(
                f"{trained.path}: {change.parts['dora_scale']} is {list(scale_shape)}, which fits neither rows nor columns of {list(change.shape)}."
            )
        if not by_rows:
            whole = model.float32(change.entry.key)[change.first : change.first + change.shape[0]]
            whole = whole + change.delta.rows(0, change.shape[0]).reshape(whole.shape)
            squares = np.moveaxis(whole, 1, 0).reshape(change.shape[1], -1)
            change.norms = np.sqrt(np.einsum("ij,ij->i", squares, squares)) + EPSILON
    return change


def _output_chunks(
    order: list[str],
    model: SafetensorsFile,
    trained: SafetensorsFile,
    changes: dict[str, list[WeightUpdate]],
    scale: np.float32,
    numbers: int,
) -> Iterator[tuple[str, int, int, list[WeightUpdate]]]:
    """Pieces of work: bytes start…stop of an untouched tensor, rows start…stop of a changed one."""
    for name in order:
        spec = model.specs[name]
        if name not in changes or scale == 0:
            step = numbers * 4  # bytes
            yield from ((name, start, min(start + step, spec.nbytes), []) for start in range(0, spec.nbytes, step))
            continue
        here = [load_update(model, trained, change) for change in changes[name]]
        step = max(1, numbers * spec.shape[0] // max(spec.count, 1))
        yield from ((name, start, min(start + step, spec.shape[0]), here) for start in range(0, spec.shape[0], step))


def _metadata(model: SafetensorsFile, recipe: Bake) -> dict[str, str]:
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": recipe.title,
        "modelspec.prediction_type": "epsilon",
    }
    return metadata | ({"modelspec.license": recipe.license} if recipe.license else {})
