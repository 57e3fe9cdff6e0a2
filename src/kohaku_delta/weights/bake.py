"""A trained tensor becomes W + scale·ΔW, computed in float32 and rounded once; every other tensor keeps its bits.

The LoKr must have been trained on this very base: its `ss_base_digest` is compared with the base's content digest,
which is computed while the base is read. With `force` this check is left to the user, and entries that match no tensor
are left out.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec, content_digest
from kohaku_delta.formats.safetensors_io import SafetensorsFile, WriteResult
from kohaku_delta.parallel import THREADS, ordered_map
from kohaku_delta.params import Bake
from kohaku_delta.printing import format_some
from kohaku_delta.sdxl import checkpoint_checks
from kohaku_delta.sdxl.tensor_names import Layout, TensorMapping, TensorNameMap
from kohaku_delta.weights import lokr_format
from kohaku_delta.weights.weight_delta import DenseDelta, KronDelta, load_delta

NUMBERS = 1 << 19  # of a tensor computed at a time
SHOWN = 10
CONTENT_HASH = "modelspec.hash_sha256"
EPSILON = np.finfo(np.float32).eps


@dataclass
class WeightUpdate:
    """What one entry of the LoKr file does to some rows of one tensor."""

    entry: TensorMapping
    module: str
    kind: str
    parts: dict[str, str]  # suffix → tensor of the LoKr file
    shape: tuple[int, ...]  # of the module's parameter
    first: int = 0  # its first row in the tensor
    magnitude: str | None = None  # the tensor dora_scale of a DoRA weight


@dataclass
class LoadedUpdate(WeightUpdate):
    """An update with its difference in memory."""

    delta: DenseDelta | KronDelta = field(kw_only=True)
    norms: np.ndarray | None = field(kw_only=True, default=None)  # DoRA by columns: ‖W + ΔW‖ of each


@dataclass
class BakeResult:
    written: WriteResult
    tensors: int  # that were changed
    left_out: list[str] = field(default_factory=list)  # modules that matched no tensor (force)
    embeddings: list[str] = field(default_factory=list)  # tensors that belong to no module (drop_extra)


Chunk = tuple[str, int, int, list[LoadedUpdate]]


@dataclass
class BakePlan:
    """The result before it is computed: the arguments of safetensors_io.write, and what is left out."""

    specs: Mapping[str, TensorSpec]
    produce: Callable[[list[str]], Iterator[tuple[str, safetensors_io.Buffer]]]
    metadata: dict[str, str]
    tensors: int
    left_out: list[str]
    embeddings: list[str]


def bake(
    base: Path,
    lokr_file: Path,
    recipe: Bake,
    side: int,
    out: Path,
    force: bool = False,
    drop_extra: bool = False,
    threads: int = 2 * THREADS,
    numbers: int = NUMBERS,
) -> BakeResult:
    """Write base + scale · LoKr to `out`. side: of the pictures that the model is made for, in pixels. drop_extra:
    leave out embeddings that are bundled with the LoKr. `threads` (half of them wait for the disk) and `numbers` do not
    change a bit.

    Raises UserError for another base than the LoKr's, entries without a tensor, other shapes, and values that are not
    finite.
    """
    with plan_bake(base, lokr_file, recipe, side, force, drop_extra, threads, numbers) as plan:
        written = safetensors_io.write(
            out, plan.specs, plan.produce, plan.metadata, [base, lokr_file], content_key=CONTENT_HASH
        )
        return BakeResult(written, plan.tensors, plan.left_out, plan.embeddings)


@contextmanager
def plan_bake(
    base: Path,
    lokr_file: Path,
    recipe: Bake,
    side: int,
    force: bool = False,
    drop_extra: bool = False,
    threads: int = 2 * THREADS,
    numbers: int = NUMBERS,
) -> Iterator[BakePlan]:
    """What bake() writes, with both files open and checked; raises as it does."""
    with safetensors_io.open_file(base) as model, safetensors_io.open_file(lokr_file) as trained:
        for file in (model, trained):
            checkpoint_checks.require_epsilon(file)
        checkpoint_checks.require_sdxl_weights(model)
        embeddings = lokr_format.embeddings(trained)
        if embeddings and not drop_extra:
            raise UserError(
                f"{lokr_file} bundles embeddings, which are not part of a model: "
                f"{checkpoint_checks.list_names(embeddings)}. --drop-extra leaves them out."
            )
        updates, left_out = plan_updates(model, trained, force)
        for _ in ordered_map(lambda update: load_update(model, trained, update), sum(updates.values(), []), threads):
            pass  # every entry is read and checked before the first byte is written
        expected = lokr_format.base_digest(trained)
        if expected is None and not force:
            raise UserError(
                f"{lokr_file} does not say which base it was trained on ({lokr_format.BASE_DIGEST}). If you know that "
                f"it was {base}, pass --force."
            )
        scale = np.float32(recipe.scale)

        def bake_chunk(chunk: Chunk) -> tuple[str, memoryview, safetensors_io.Buffer]:
            """(tensor, bytes of the base, bytes to write)"""
            name, start, stop, here = chunk
            dtype, shape = model.specs[name].dtype, model.specs[name].shape
            if not here:
                raw = model.read_bytes(name, start, stop - start)
                if not dtypes.all_finite(np.frombuffer(raw, dtypes.NUMPY[dtype]), dtype):
                    raise UserError(f"{name} holds NaN or infinity: {base} is damaged. Run the stage that writes it.")
                return name, raw, raw
            row = prod(shape[1:]) * dtypes.BYTES[dtype]
            raw = model.read_bytes(name, start * row, (stop - start) * row)
            values = dtypes.to_float32(np.frombuffer(raw, dtypes.NUMPY[dtype]), dtype)
            for update in here:
                apply_update(values.reshape(stop - start, *shape[1:]), start, update, scale, trained)
            stored = dtypes.from_float32(values, dtype)
            if not dtypes.all_finite(stored, dtype):
                raise UserError(
                    f"{name} would hold NaN or infinity as {dtype}: {base} is damaged, or {lokr_file} does not belong "
                    "to it."
                )
            return name, raw, stored

        def produce(order: list[str]) -> Iterator[tuple[str, safetensors_io.Buffer]]:
            hashes = {name: hashlib.sha256() for name in order}
            chunks = _output_chunks(order, model, trained, updates if scale else {}, numbers)
            with ThreadPoolExecutor(1) as pool:
                for name, raw, piece in ordered_map(bake_chunk, chunks, threads):
                    hashing = pool.submit(hashes[name].update, raw)
                    yield name, piece
                    hashing.result()
            digest = content_digest(model.specs, {name: each.hexdigest() for name, each in hashes.items()})
            if expected is not None and expected != digest and not force:
                raise UserError(
                    f"{lokr_file} was trained on another base: its {lokr_format.BASE_DIGEST} is {expected[:16]}…, and "
                    f"{base} has the content digest {digest[:16]}…. On a wrong base it gives garbage. Name the base "
                    "that it was trained on with --base, or pass --force."
                )

        yield BakePlan(model.specs, produce, _metadata(recipe, side), len(updates), left_out, embeddings)


def plan_updates(
    model: SafetensorsFile, trained: SafetensorsFile, force: bool
) -> tuple[dict[str, list[WeightUpdate]], list[str]]:
    """The updates of each tensor by its name, and the modules that match no tensor. Raises UserError for such modules
    without `force`, and for entries that the tensors cannot take.
    """
    modules_by_name = TensorNameMap(Layout.of(model.specs)).by_lora()
    updates: dict[str, list[WeightUpdate]] = {}
    left_out: list[str] = []
    names: dict[TensorMapping, str] = {}
    for module, (kind, parts) in lokr_format.group_by_module(trained).items():
        weight, bias = modules_by_name.get(module, (None, None))
        if weight is None or weight.key not in model.specs:
            left_out.append(module)
            continue
        if names.setdefault(weight, module) != module:
            raise UserError(
                f"{trained.path}: {module} and {names[weight]} are two names of one layer. The file is damaged."
            )
        targets = [weight] if kind == "lokr" or {"w_norm", "diff"} & set(parts) else []
        if kind != "lokr" and {"b_norm", "diff_b"} & set(parts):
            if bias is None or bias.key not in model.specs:
                raise UserError(f"{trained.path}: {module} changes a bias, and {model.path} has none there.")
            targets.append(bias)
        for entry in targets:
            spec = model.specs[entry.key]
            shape = entry.shape_in_module(spec.shape)
            if not shape or spec.dtype not in dtypes.FLOATS:
                raise UserError(f"{model.path}: {entry.key} is {spec.dtype} {list(spec.shape)}, which cannot be baked.")
            magnitude = parts.get("dora_scale") if entry is weight else None
            updates.setdefault(entry.key, []).append(
                WeightUpdate(entry, module, kind, parts, shape, shape[0] * entry.third, magnitude)
            )
    if left_out and not force:
        raise UserError(
            f"{trained.path}: {format_some(left_out, SHOWN)} match no tensor of {model.path}. "
            "It was trained on a model of another kind; pass --force to leave them out."
        )
    return updates, left_out


def load_update(model: SafetensorsFile, trained: SafetensorsFile, update: WeightUpdate) -> LoadedUpdate:
    """The update with its difference in memory. Raises UserError for parts that are not whole, finite and of the
    tensor's shape.
    """
    bias = update.entry.path.endswith(".bias")
    delta = load_delta(trained, update.module, update.kind, update.parts, update.shape, bias)
    shape = update.shape
    if update.entry.form == "transposed":
        turned = delta.rows(0, shape[0]).T
        delta, shape = DenseDelta(turned, turned.shape), turned.shape
    loaded = LoadedUpdate(**(vars(update) | {"shape": shape}), delta=delta)
    if update.magnitude is None:
        return loaded
    magnitudes = trained.specs[update.magnitude].shape
    by_rows = prod(magnitudes) == shape[0] and magnitudes[:1] == shape[:1]
    by_columns = len(shape) > 1 and prod(magnitudes) == shape[1] and magnitudes[1:2] == shape[1:2]
    if update.entry.form == "transposed" or not (by_rows or by_columns):
        raise UserError(
            f"{trained.path}: {update.magnitude} is {list(magnitudes)}, which fits neither the rows nor the columns of "
            f"{list(shape)}."
        )
    if not by_rows:
        whole = model.float32(update.entry.key)[update.first : update.first + shape[0]]
        whole = whole + delta.rows(0, shape[0]).reshape(whole.shape)
        loaded.norms = _norms(np.moveaxis(whole, 1, 0))
    return loaded


def _norms(rows: np.ndarray) -> np.ndarray:
    """‖row‖ of each row, plus ε."""
    flat = rows.reshape(len(rows), -1)
    return np.sqrt(np.einsum("ij,ij->i", flat, flat)) + EPSILON


def apply_update(
    values: np.ndarray, start: int, update: LoadedUpdate, scale: np.float32, trained: SafetensorsFile
) -> None:
    """Apply an update to `values`, the rows of a tensor from row `start` on (float32), in place."""
    first, last = max(start, update.first), min(start + len(values), update.first + update.shape[0])
    if first >= last:
        return
    part = values[first - start : last - start]
    rows = slice(first - update.first, last - update.first)
    delta = update.delta.rows(rows.start, rows.stop).reshape(part.shape)
    if update.magnitude is None:
        part += delta if scale == 1 else delta * scale
        return
    # W' = (W + ΔW) · (1 + scale · (m / ‖W + ΔW‖ − 1)), with the norm of each row or of each column
    part += delta
    magnitude = trained.float32(update.magnitude).reshape(-1)
    if update.norms is None:
        factor = (magnitude[rows] / _norms(part)).reshape(-1, *[1] * (part.ndim - 1))
    else:
        factor = (magnitude / update.norms).reshape(1, -1, *[1] * (part.ndim - 2))
    part *= 1 + scale * (factor - 1)


def _output_chunks(
    order: list[str],
    model: SafetensorsFile,
    trained: SafetensorsFile,
    updates: dict[str, list[WeightUpdate]],
    numbers: int,
) -> Iterator[Chunk]:
    """The pieces of the output: bytes start…stop of an unchanged tensor, rows start…stop of a changed one."""
    for name in order:
        spec = model.specs[name]
        here = [load_update(model, trained, update) for update in updates.get(name, [])]
        total = spec.shape[0] if here else spec.nbytes
        step = (
            max(1, numbers * spec.shape[0] // max(spec.count, 1)) if here else numbers * 8
        )  # whole numbers of any dtype
        yield from ((name, start, min(start + step, total), here) for start in range(0, total, step))


def _metadata(recipe: Bake, side: int) -> dict[str, str]:
    """What a WebUI shows of the file, by Stability's ModelSpec. The hash of the contents is added when it is known."""
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": recipe.title,
        "resolution": f"{side}x{side}",
        "prediction_type": "epsilon",
        "author": recipe.author,
        "description": recipe.description,
        "date": recipe.date,
        "license": recipe.license,
    }
    return {"format": "pt"} | {f"modelspec.{name}": value for name, value in values.items() if value}
