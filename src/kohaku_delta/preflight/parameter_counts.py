"""Sizes of the model and of its LoKr, counted on the modules themselves without their weights.

The model is a local checkpoint of the recipe; otherwise SDXL 1.0, if the pinned sizes are SDXL's; otherwise a
checkpoint in the mirror. Otherwise its size is not known, and nothing is planned from it.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kohaku_delta.errors import UserError
from kohaku_delta.hub import pins
from kohaku_delta.params import NETWORK_WEIGHTS, Pin, Recipe

CLIP: dict[str, int | None] = {
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": None,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
# Stability AI's SDXL 1.0: config.json of unet, text_encoder, text_encoder_2 and vae at the pinned revision
SDXL: dict[str, dict] = {
    "unet": {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "te1": CLIP
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "te2": CLIP
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "vae": {
        "sample_size": 1024,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    },
}
SDXL_BYTES = (6.94e9, 13.88e9)  # a checkpoint in fp16 and in fp32: 3.47 billion numbers
# bitsandbytes 0.50.2: the size from which Lion keeps 8-bit state, and the numbers that share a scale of 4 bytes
EIGHT_BIT_FROM, BLOCK = 4096, 256


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of numbers, and bytes of the optimizer's state. `of`: the model that was counted.

    `entries`: tensors of the LoKr; `trained`: its numbers that get a gradient.
    """

    of: str
    unet: int
    text: int
    vae: int
    lokr: int
    entries: int
    trained: int
    optimizer: int


def count_parameters(recipe: Recipe, folder: Path) -> ParameterCounts | None:
    """Sizes of the model and LoKr of the recipe in `folder`; None if unknown before the download. Imports torch."""
    found = _model_parts(recipe, folder)
    if not found:
        return None
    name, configs, parts = found
    sizes = {part: sum(weight.numel() for weight in module.parameters()) for part, module in parts.items()}
    # The penultimate output of text encoder 1 is used, so its last layer gets no gradient.
    untrained = f"lora_te1_text_model_encoder_layers_{configs['te1']['num_hidden_layers'] - 1}_"
    entries = {name: prod(shape) for name, shape in _lokr_shapes(recipe, parts).items()}
    trained = [count for name, count in entries.items() if not name.startswith(untrained)]
    return ParameterCounts(
        of=name,
        unet=sizes["unet"],
        text=sizes["te1"] + sizes["te2"],
        vae=sizes["vae"],
        lokr=sum(entries.values()),
        entries=len(entries),
        trained=sum(trained),
        optimizer=sum(map(_optimizer_bytes, trained)),
    )


def network_weights_error(recipe: Recipe, folder: Path) -> str | None:
    """Why the training would refuse the LoKr that it is to begin with; "" if it would not; None if the recipe names
    none, or before the download. Its base is compared by the training alone. Imports torch.
    """
    from kohaku_delta.formats import safetensors_io
    from kohaku_delta.weights import lokr_format

    pin = recipe.download.inputs.get(NETWORK_WEIGHTS)
    path = _pinned_file(recipe, folder, pin) if isinstance(pin, Pin) else None
    found = _model_parts(recipe, folder) if path and path.is_file() else None
    if not path or not found:
        return None
    try:
        with safetensors_io.open_file(path) as file:
            for _ in lokr_format.read_weights(file, _lokr_shapes(recipe, found[2]), recipe.lokr.alpha):
                pass
    except UserError as error:
        return error.message
    return ""


def _model_parts(recipe: Recipe, folder: Path) -> tuple[str, dict[str, dict], dict[str, Any]] | None:
    """(name, configs, modules without weights) of the model; None if its size is not known."""
    from kohaku_delta.formats import safetensors_io
    from kohaku_delta.sdxl import model_loading

    checkpoint = _local_checkpoint(recipe, folder) or (
        None if _is_sdxl(recipe) else _mirrored_checkpoint(recipe, folder)
    )
    if not checkpoint and not _is_sdxl(recipe):
        return None
    configs: dict[str, dict] = SDXL
    if checkpoint:
        with safetensors_io.open_file(checkpoint) as file:
            shapes = {name: spec.shape for name, spec in file.specs.items()}
        configs = model_loading.architecture(shapes, recipe.model)
    return checkpoint.name if checkpoint else "SDXL 1.0", configs, model_loading.build(configs)


def _lokr_shapes(recipe: Recipe, parts: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the LoKr, by its name in the file."""
    import torch
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    from kohaku_delta.weights import lokr_preset

    lokr, shapes = recipe.lokr, dict[str, tuple[int, ...]]()
    settings: dict[str, Any] = {"lora_dim": lokr.dim, "alpha": lokr.alpha, "weight_decompose": lokr.dora}
    with torch.device("meta"):
        for target in lokr_preset.lokr_targets({part: parts[part] for part in ("te1", "te2", "unet")}, lokr.preset):
            layer = parts[target.part].get_submodule(target.path)
            if target.algorithm == "norm":
                entry = NormModule(target.lora, layer)
            else:
                entry = LokrModule(target.lora, layer, factor=target.factor, full_matrix=True, **settings)
            shapes |= {f"{target.lora}.{name}": tuple(weight.shape) for name, weight in entry.named_parameters()}
    lokr_preset.require_full_matrices(lokr.dim, shapes)
    return shapes


def _optimizer_bytes(count: int) -> int:
    """Lion8bit's state of a weight with `count` numbers: 8 bits each and a scale per block; fp32 for a small weight."""
    return count + 4 * -(-count // BLOCK) if count >= EIGHT_BIT_FROM else 4 * count


def architecture_pins(recipe: Recipe) -> dict[str, Pin]:
    """The pins of checkpoints that have the model's architecture, the most reliable first."""
    names = ("delta_base", "sdxl") if recipe.merge.start == "published" else ("sdxl", "beta", "gamma")
    return {name: pin for name in names if isinstance(pin := recipe.download.inputs.get(name), Pin)}


def _pinned_file(recipe: Recipe, folder: Path, pin: Pin) -> Path:
    """Where the file of a pin is, or will be."""
    if pin.local_path:
        return folder / pin.local_path
    return folder / recipe.download.mirror / pins.hub_file(pin).path


def _local_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    local = [pin for pin in architecture_pins(recipe).values() if pin.local_path]
    return next((path for pin in local if (path := _pinned_file(recipe, folder, pin)).is_file()), None)


def _mirrored_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    remote = [pin for pin in architecture_pins(recipe).values() if not pin.local_path]
    return next((path for pin in remote if (path := _pinned_file(recipe, folder, pin)).is_file()), None)


def _is_sdxl(recipe: Recipe) -> bool:
    """Whether the pinned sizes, as far as there are any, are those of SDXL 1.0."""
    sizes = [pin.bytes for pin in architecture_pins(recipe).values() if pin.bytes]
    return bool(sizes) and all(any(abs(size / sdxl - 1) < 0.01 for sdxl in SDXL_BYTES) for size in sizes)
