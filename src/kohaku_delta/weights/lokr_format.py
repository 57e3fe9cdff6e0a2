"""The LoKr file, as every common program reads it: kohya's names, fp16, a finite .alpha, norm differences. Its bytes
depend on the training only.

A module's tensors are `<name>.lokr_w1`, `.lokr_w2`, `.alpha`; a norm's are `.w_norm`, `.b_norm`. The metadata are the
`ss_*` and `modelspec.*` keys that WebUIs show, without what varies from run to run (session, times, host), and the
content digest of the base as `ss_base_digest`: a LoKr is useless on another base. `sshs_model_hash` is the sha256 of
everything after the header.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from kohaku_delta.errors import UserError, first_lines
from kohaku_delta.formats import dtypes, safetensors_header, safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec
from kohaku_delta.formats.safetensors_io import SafetensorsFile, WriteResult
from kohaku_delta.params import Recipe

BASE_DIGEST, STEPS, CONTENT_HASH = "ss_base_digest", "ss_steps", "sshs_model_hash"
START = "ss_network_weights"  # sha256 of the LoKr file that the training began with, if it did not start from scratch
# the suffixes of an entry's tensors by its kind, which either of the first two decides
KINDS = {
    "lokr": tuple("lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 alpha dora_scale".split()),  # noqa: SIM905
    "norm": ("w_norm", "b_norm"),
    "full": ("diff", "diff_b", "alpha", "dora_scale"),
}

EMBEDDING = "bundle_emb."
# the tensors that tell another kind of file
OTHER_KINDS = {
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoRA (or LoCon)": re.compile(r"\.lora(_up|_down|_mid|_A|_B)?\.([\w.]+\.)?weight$|\.lora\.(up|down)\.weight$"),
    "OFT (or BOFT)": re.compile(r"\.oft_\w+(\.weight)?$"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "(IA)³": re.compile(r"\.on_input$"),
}


def write_lokr(
    path, weights: Mapping[str, np.ndarray], recipe: Recipe, base_digest: str, facts: Mapping[str, str] | None = None
) -> WriteResult:
    """Write the trained weights ({"<name>.lokr_w1": float array, …}, without .alpha) as fp16. facts: more metadata that
    the training decides (ss_steps …). Raises UserError for a value that fp16 cannot hold, with the tensor's name.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(weight).astype(np.float16)
        if not np.isfinite(tensors[name]).all():
            raise UserError(
                f"{path}: {name} holds a value that is not finite in fp16. The training diverged; nothing was written."
            )
        if name.endswith((".lokr_w1", ".lokr_w1_a")):
            tensors[name.rpartition(".")[0] + ".alpha"] = np.array(recipe.lokr.alpha, np.float16)
    specs = {name: TensorSpec("F16", array.shape) for name, array in tensors.items()}
    content = hashlib.sha256()
    for name in safetensors_header.build_header(specs, {})[1]:
        content.update(tensors[name].reshape(-1).data)
    return safetensors_io.save(
        path, tensors, metadata(recipe, base_digest) | dict(facts or {}) | {CONTENT_HASH: content.hexdigest()}
    )


def metadata(recipe: Recipe, base_digest: str) -> dict[str, str]:
    """The file's metadata about its training, as sd-scripts writes them."""
    lokr, train, schedule = recipe.lokr, recipe.train, recipe.schedule
    side = math.isqrt(schedule.area)
    network = {
        "algo": "lokr",
        "conv_dim": str(lokr.dim),
        "conv_alpha": str(lokr.alpha),
        "dropout": "0.0",
        "train_norm": str(lokr.preset.norms),
        "preset": lokr.preset.model_dump(),
    }
    betas = ", ".join(str(beta) for beta in train.betas)
    values = {
        "ss_base_model_version": "sdxl_base_v1-0",
        BASE_DIGEST: base_digest,
        "ss_sd_model_name": "delta-base.safetensors",
        "ss_output_name": "delta-lokr",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": lokr.dim,
        "ss_network_alpha": lokr.alpha,
        "ss_network_args": json.dumps(network, sort_keys=True),
        "ss_optimizer": f"bitsandbytes.optim.lion.{train.optimizer}(betas=({betas}),weight_decay={train.weight_decay})",
        "ss_learning_rate": train.learning_rate_unet,
        "ss_unet_lr": train.learning_rate_unet,
        "ss_text_encoder_lr": train.learning_rate_text,
        "ss_lr_scheduler": "constant_with_warmup",
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_max_grad_norm": train.clip_norm,
        "ss_mixed_precision": {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}[train.precision],
        "ss_full_fp16": train.weights == "float16",
        "ss_gradient_checkpointing": train.gradient_checkpointing,
        "ss_batch_size_per_device": schedule.batch_size,
        "ss_total_batch_size": schedule.batch_size * schedule.micro_batches,
        "ss_num_epochs": schedule.epochs,
        "ss_epoch": schedule.epochs,
        "ss_seed": train.seed,
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": True,
        "ss_bucket_no_upscale": False,
        "ss_min_bucket_reso": schedule.min_side,
        "ss_max_bucket_reso": schedule.max_side,
        "ss_cache_latents": False,
        "ss_max_token_length": train.max_token_length,
        "ss_shuffle_caption": train.shuffle_caption,
        "ss_caption_tag_dropout_rate": train.tag_dropout,
        "ss_noise_offset": train.noise_offset,
        "ss_min_snr_gamma": train.min_snr_gamma,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Kohaku XL Delta, LoKr",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "epsilon",
    }
    return {name: str(value) for name, value in values.items()}


def embeddings(file: SafetensorsFile) -> list[str]:
    """The tensors of embeddings that are bundled with a LoKr file: textual inversions, no part of any module."""
    return [name for name in file.specs if name.startswith(EMBEDDING)]


def group_by_module(file: SafetensorsFile) -> dict[str, tuple[str, dict[str, str]]]:
    """module name → (kind, {suffix: tensor name}) of an open LoKr file, sorted, without bundled embeddings. Raises
    UserError for a tensor that is not part of a LoKr, a norm difference or a full difference.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in sorted(file.specs.keys() - set(embeddings(file))):
        for other, telling in OTHER_KINDS.items():
            if telling.search(name):
                raise UserError(
                    f"{file.path} is a {other}: it has the tensor {name!r:.160}. Only LoKr files, norm differences and "
                    "full differences are read here: name a LoKr file."
                )
        module, _, suffix = name.partition(".")
        modules.setdefault(module, {})[suffix] = name
    found = {}
    for module, parts in sorted(modules.items()):
        kind = next((kind for kind, suffixes in KINDS.items() if suffixes[0] in parts or suffixes[1] in parts), None)
        unknown = [suffix for suffix in parts if kind is None or suffix not in KINDS[kind]]
        if kind is None or unknown:
            raise UserError(
                f"{file.path}: {parts[unknown[0]]!r:.160} is not part of a LoKr, a norm difference or a full "
                "difference. Name a LoKr file."
            )
        found[module] = kind, parts
    if not found:
        raise UserError(f"{file.path} has no tensors of a LoKr. Name a LoKr file.")
    return found


def base_digest(file: SafetensorsFile) -> str | None:
    """The content digest of the base that the file was trained on, if its metadata name it."""
    return file.metadata.get(BASE_DIGEST)


def read_weights(
    file: SafetensorsFile, shapes: Mapping[str, tuple[int, ...]], alpha: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of the weights of a training, ascending, from the LoKr file of another one.

    shapes: of each weight that is trained; alpha: lokr.alpha. Raises UserError, before the first weight, if the file
    has other modules, factors, shapes or another alpha; and for a value that is not finite in float16, in which the
    next LoKr file would have it.
    """
    group_by_module(file)
    stored = {name: spec for name, spec in file.specs.items() if not name.endswith(".alpha")}
    faults = [f"missing: {name}" for name in sorted(shapes.keys() - stored.keys())]
    faults += [f"not trained by this recipe: {name}" for name in sorted(stored.keys() - shapes.keys())]
    faults += [
        f"other shape: {name} is {list(stored[name].shape)}, and {list(shape)} is trained"
        for name, shape in sorted(shapes.items())
        if name in stored and stored[name].shape != tuple(shape)
    ]
    for name in sorted(file.specs.keys() - stored.keys()):
        if np.float16(found := _read_number(file, name)) != np.float16(alpha):
            faults.append(f"other alpha: {name} is {found:g}, and lokr.alpha is {alpha}")
    if faults:
        raise UserError(
            f"{file.path} is not a LoKr of this recipe's section lokr on a model of its base's shapes:",
            *first_lines(faults),
            "Name a LoKr that was trained with these modules and factors, or copy the section lokr of its recipe.",
        )
    for name in sorted(shapes):
        values = file.float32(name)
        with np.errstate(over="ignore"):
            if not np.isfinite(values.astype(np.float16)).all():
                raise UserError(
                    f"{file.path}: {name} holds NaN, infinity or a value that is too large for float16. The file is "
                    "damaged, or its training diverged: name another one."
                )
        yield name, values


def _read_number(file: SafetensorsFile, name: str) -> float:
    """The number that a tensor of one number holds, a float or a whole one; NaN for a tensor of several."""
    if file.specs[name].count != 1:
        return math.nan
    values = file.float32(name) if file.specs[name].dtype in dtypes.FLOATS else file.read(name)
    return float(values.reshape(-1)[0])


def require_base(file: SafetensorsFile, digest: str, base: Path) -> None:
    """Raises UserError if the file says that it was trained on another base than the one with this content digest."""
    if base_digest(file) not in (None, digest):
        raise UserError(
            f"{file.path} was trained on another base than {base}: it names the contents {base_digest(file)}, and that "
            f"one has {digest}. Train on from it on its own base (merge.start: published, download.inputs.delta_base)."
        )


def verified_metadata(path: Path) -> dict[str, str]:
    """The metadata of a LoKr file that a training wrote, after all of its tensors were read and compared with the hash
    in them. Raises UserError for any other file.
    """
    with safetensors_io.open_file(path) as file:
        content = hashlib.sha256()
        for name in safetensors_header.build_header(file.specs, {})[1]:
            for piece in file.iter_chunks(name):
                content.update(piece)
        metadata = file.metadata
    if not {BASE_DIGEST, STEPS, CONTENT_HASH} <= metadata.keys() or not metadata[STEPS].isdecimal():
        raise UserError(
            f"{path} does not say on which base and for how many steps it was trained ({BASE_DIGEST}, {STEPS}): "
            "the train stage did not write it. Move it away."
        )
    if content.hexdigest() != metadata[CONTENT_HASH]:
        raise UserError(
            f"{path} is damaged: its tensors do not have the hash that the file says ({CONTENT_HASH}). Delete it; "
            "the train stage writes it again from its saved state."
        )
    return metadata
