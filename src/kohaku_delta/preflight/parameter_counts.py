"""Invariant: sizes are counted on the modules themselves, without their numbers: of a local checkpoint of the recipe;
else of SDXL 1.0, if the pinned sizes are its own; else of a checkpoint in the mirror. Otherwise the model's size is
not known, and nothing is planned from it.
"""

from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.hub import pins
from kohaku_delta.params import Pin, Recipe

CLIP = {
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": None,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
# Stability AI's SDXL 1.0: config.json of unet, text_encoder, text_encoder_2 and vae at the pinned revision
SDXL = {
    "unet": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "te1": CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
    "te2": CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
    "vae": {
        "sample_size": 1024, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    },
}  # fmt: skip
SDXL_BYTES = (6.94e9, 13.88e9)  # of a checkpoint in fp16 and in fp32: 3.47 billion numbers
EIGHT_BIT, BLOCK = (
    4096,
    256,
)  # bitsandbytes 0.50.2: elements from which Lion keeps 8 bits, and elements a scale of 4 bytes


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of numbers, and bytes of the optimizer's state. `of`: whose sizes these are.

    `entries`: tensors of the LoKr; `trained`: its numbers that a gradient reaches."""

    of: str
    unet: int
    text: int
    vae: int
    lokr: int
    entries: int
    trained: int
    optimizer: int


def count_parameters(recipe: Recipe, folder: Path) -> ParameterCounts | None:
    """The sizes of the recipe's model and LoKr; None if they are not known before the download. Imports torch."""
    import torch
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    from kohaku_delta.formats import safetensors_io
    from kohaku_delta.sdxl import model_loading
    from kohaku_delta.weights import lokr_preset

    checkpoint = _local_checkpoint(recipe, folder, "file://") or (
        None if _is_sdxl(recipe) else _local_checkpoint(recipe, folder, "hf://")
    )
    if not checkpoint and not _is_sdxl(recipe):
        return None
    if checkpoint:
        with safetensors_io.open_file(checkpoint) as file:
            configs = model_loading.architecture({name: spec.shape for name, spec in file.specs.items()}, recipe.model)
    else:
        configs = SDXL
    built = model_loading.build(configs)
    sizes = {part: sum(weight.numel() for weight in module.parameters()) for part, module in built.items()}
    idle = f"lora_te1_text_model_encoder_layers_{built['te1'].config.num_hidden_layers - 1}_"
    lokr = recipe.lokr
    weights: list[tuple[bool, int]] = []
    with torch.device("meta"):
        for target in lokr_preset.lokr_targets({part: built[part] for part in ("te1", "te2", "unet")}, lokr.preset):
            layer = built[target.part].get_submodule(target.path)
            if target.algorithm == "norm":
                entry = NormModule(target.lora, layer)
            else:
                entry = LokrModule(
                    target.lora, layer, lora_dim=lokr.dim, alpha=lokr.alpha, factor=target.factor, full_matrix=True
                )
            weights += [(target.lora.startswith(idle), weight.numel()) for weight in entry.parameters()]
    trained = [size for never, size in weights if not never]
    return ParameterCounts(
        of=checkpoint.name if checkpoint else "SDXL 1.0",
        unet=sizes["unet"],
        text=sizes["te1"] + sizes["te2"],
        vae=sizes["vae"],
        lokr=sum(size for _, size in weights),
        entries=len(weights),
        trained=sum(trained),
        optimizer=sum(state(size) for size in trained),
    )


def state(size: int) -> int:
    """Bytes of Lion8bit's state for a weight of so many numbers: 8 bits and a scale a block, or fp32 for a small one."""
    return size + 4 * -(-size // BLOCK) if size >= EIGHT_BIT else 4 * size


def checkpoints(recipe: Recipe) -> dict[str, Pin]:
    """The pins whose files have the model's architecture, the surest first."""
    names = ("delta_base", "sdxl") if recipe.merge.start == "published" else ("sdxl", "beta", "gamma")
    return {name: pin for name in names if isinstance(pin := recipe.download.inputs.get(name), Pin)}


def _local_checkpoint(recipe: Recipe, folder: Path, scheme: str) -> Path | None:
    """A checkpoint that is a local file (file://), or is in the mirror already (hf://): the miniature's has dimensions
    of its own.
    """
    for pin in checkpoints(recipe).values():
        if pin.url.startswith(scheme):
            path = folder / (
                pin.url.removeprefix(scheme)
                if scheme == "file://"
                else Path(recipe.download.mirror) / pins.hub_file(pin).path
            )
            if path.is_file():
                return path
    return None


def _is_sdxl(recipe: Recipe) -> bool:
    """Whether the pinned sizes, as far as there are any, are those of SDXL 1.0."""
    known = [pin.bytes for pin in checkpoints(recipe).values() if pin.bytes]
    return bool(known) and all(any(abs(each / size - 1) < 0.01 for size in SDXL_BYTES) for each in known)
