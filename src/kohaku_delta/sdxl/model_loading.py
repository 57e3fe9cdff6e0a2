"""Loading a checkpoint into diffusers' and transformers' modules: every tensor has its parameter and every parameter
its tensor, of the right shape, or nothing is loaded.

`architecture` derives the configurations of the four parts from the tensors' shapes; what shapes do not show (head
size, groups of the norms) comes from the recipe. `load` builds the modules without drawing a random number;
`to_checkpoint` is the way back.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohaku_delta.errors import UserError, first_lines
from kohaku_delta.formats import safetensors_io
from kohaku_delta.params import Model
from kohaku_delta.sdxl import checkpoint_checks
from kohaku_delta.sdxl.tensor_names import (
    LOGIT_SCALE,
    NO_PARAMETER,
    PARTS,
    POSITION_IDS,
    PREFIX,
    Layout,
    TensorMapping,
    TensorNameMap,
)

CLASSES = {"unet": UNet2DConditionModel, "te1": CLIPTextModel, "te2": CLIPTextModelWithProjection, "vae": AutoencoderKL}
Shape = Callable[[str, str, int], tuple[int, ...]]  # (part, tensor's name in it, least number of axes) → its shape
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


def architecture(shapes: Mapping[str, tuple[int, ...]], model: Model) -> dict[str, dict]:
    """The constructor arguments of each part, {"unet": {…}, "te1": {…}, "te2": {…}, "vae": {…}}, from a checkpoint's
    tensor shapes and the recipe's `model`. Raises UserError, with its name, for a needed tensor that is missing.
    """
    layout = Layout.of(shapes)

    def shape(part: str, name: str, axes: int) -> tuple[int, ...]:
        found = shapes.get(PREFIX[part] + name)
        if found is None:
            raise UserError(f"the checkpoint has no tensor {PREFIX[part] + name}: it is not a whole SDXL checkpoint")
        if len(found) < axes or 0 in found:
            raise UserError(
                f"the checkpoint's {PREFIX[part] + name} has the shape {list(found)}, which no SDXL model has"
            )
        return tuple(found)

    return {
        "unet": _unet_config(layout, shape, model),
        **_text_encoder_configs(layout, shape, model),
        "vae": _vae_config(layout, shape, model),
    }


def _unet_config(layout: Layout, shape: Shape, model: Model) -> dict:
    channels = [
        shape("unet", f"input_blocks.{1 + level * (layout.layers + 1)}.0.out_layers.3.weight", 4)[0]
        for level in range(layout.levels)
    ]
    attended = next((level for level, depth in enumerate(layout.depths) if depth), None)
    if attended is None or layout.middle == 0:
        raise UserError("the checkpoint's U-Net has no attention: it is not an SDXL checkpoint")
    first = f"input_blocks.{1 + attended * (layout.layers + 1)}.1."
    linear = len(shape("unet", first + "proj_in.weight", 2)) == 2
    sides = (
        tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layout.depths),
        tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(layout.depths)),
    )
    vae_side = 2 ** max(layout.vae_levels - 1, 0)
    return {
        "sample_size": model.side // vae_side,
        "in_channels": shape("unet", "input_blocks.0.0.weight", 4)[1],
        "out_channels": shape("unet", "out.2.weight", 4)[0],
        "down_block_types": sides[0],
        "up_block_types": sides[1],
        "block_out_channels": tuple(channels),
        "layers_per_block": layout.layers,
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in layout.depths),
        # the number of heads, by an old mistake of diffusers
        "attention_head_dim": tuple(max(width // model.head_dim, 1) for width in channels),
        "cross_attention_dim": shape("unet", first + "transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": linear,
        "norm_num_groups": model.norm_groups,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": shape("unet", "label_emb.0.0.weight", 2)[1],
    }


def _text_encoder_configs(layout: Layout, shape: Shape, model: Model) -> dict[str, dict]:
    te1_words, te1_width = shape("te1", "embeddings.token_embedding.weight", 2)
    te2_words, te2_width = shape("te2", "token_embedding.weight", 2)
    projection = shape("te2", "text_projection", 2)[1]
    te1_inner = shape("te1", "encoder.layers.0.mlp.fc1.weight", 2)[0]
    te2_inner = shape("te2", "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    te1 = _clip(te1_words, te1_width, te1_inner, layout.te1_layers, model.head_dim) | {
        "max_position_embeddings": shape("te1", "embeddings.position_embedding.weight", 2)[0],
        "hidden_act": "quick_gelu",
        "projection_dim": te1_width,
    }
    te2 = _clip(te2_words, te2_width, te2_inner, layout.te2_layers, model.head_dim) | {
        "max_position_embeddings": shape("te2", "positional_embedding", 2)[0],
        "hidden_act": "gelu",
        "projection_dim": projection,
    }
    return {"te1": te1, "te2": te2}


def _vae_config(layout: Layout, shape: Shape, model: Model) -> dict:
    return {
        "sample_size": model.side,
        "in_channels": shape("vae", "encoder.conv_in.weight", 4)[1],
        "out_channels": shape("vae", "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape("vae", "decoder.conv_in.weight", 4)[1],
        "down_block_types": ("DownEncoderBlock2D",) * layout.vae_levels,
        "up_block_types": ("UpDecoderBlock2D",) * layout.vae_levels,
        "block_out_channels": tuple(
            shape("vae", f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(layout.vae_levels)
        ),
        "layers_per_block": layout.vae_layers,
        "norm_num_groups": model.norm_groups,
        "act_fn": "silu",
        "scaling_factor": model.vae_scaling_factor,
        "force_upcast": True,  # SDXL 1.0's VAE overflows in fp16
    }


def _clip(words: int, width: int, inner: int, layers: int, head_dim: int) -> dict:
    """The constructor arguments that both text encoders have. words: of the vocabulary; inner: width of the MLP."""
    # CLIP's last two tokens are begin and end; the pooled output is taken at the first end
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // head_dim, 1),
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": None,
    }


def build(configs: Mapping[str, dict], parts=PARTS, attention: str = "sdpa") -> dict[str, torch.nn.Module]:
    """The parts as modules on the meta device (shapes without numbers). attention: sdpa | eager."""
    modules: dict[str, torch.nn.Module] = {}
    with torch.device("meta"):
        for part in parts:
            try:
                if part in ("unet", "vae"):
                    module = CLASSES[part](**configs[part])
                    if attention == "eager":
                        module.set_default_attn_processor()
                else:
                    config = CLIPTextConfig(**configs[part])
                    config._attn_implementation = attention
                    module = CLASSES[part](config)
            except (ValueError, ZeroDivisionError) as error:
                raise UserError(
                    "the tensor shapes do not fit model.head_dim and model.norm_groups of params.yaml "
                    f"({part}: {error})"
                ) from None
            modules[part] = module.eval()
    return modules


def load(
    path, model: Model, parts=PARTS, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> dict[str, torch.nn.Module]:
    """The parts of a checkpoint as modules in eval mode, on the CPU, with requires_grad off. Raises UserError for a
    checkpoint with missing, extra or other-shaped tensors of any part, and names them.
    """
    path = Path(path)
    with safetensors_io.open_file(path) as file:
        checkpoint_checks.require_epsilon(file)
        checkpoint_checks.require_sdxl_weights(file)
        shapes = {name: spec.shape for name, spec in file.specs.items()}
        modules = build(require_architecture(path, shapes, model), parts, attention)
        names = TensorNameMap(Layout.of(shapes))
        for part in parts:
            state = {}
            for entry in names.entries:
                if entry.part == part and entry.key in file.specs:
                    state[entry.path] = (
                        _in_module(entry, tensor(file.read(entry.key), file.specs[entry.key].dtype))
                        .to(dtype, copy=True)
                        .contiguous()
                    )
            module = modules[part]
            module.load_state_dict(state, strict=True, assign=True)
            _fill_buffers(module)
            module.requires_grad_(False)
    return {part: modules[part] for part in parts}


def require_architecture(path, shapes: Mapping[str, tuple[int, ...]], model: Model) -> dict[str, dict]:
    """`architecture` of the checkpoint at `path`. Raises UserError for missing, extra or other-shaped tensors."""
    try:
        configs = architecture(shapes, model)
        faults = shape_faults(TensorNameMap(Layout.of(shapes)), build(configs), shapes)
    except UserError as refusal:
        raise UserError(f"{path}: {refusal.lines[0]}", *refusal.lines[1:]) from None
    if faults:
        extra = checkpoint_checks.outside(shapes)
        remedy = ["The merge stage leaves out what is not part of SDXL (merge.extra_tensors: drop)."] if extra else []
        raise UserError(f"{path} is not the SDXL checkpoint that its shapes suggest:", *first_lines(faults), *remedy)
    return configs


def shape_faults(
    names: TensorNameMap, modules: Mapping[str, torch.nn.Module], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The differences between a checkpoint's tensors and the modules' parameters, one line each."""
    faults, explained = [], set(NO_PARAMETER)
    for part, module in modules.items():
        for path, parameter in module.state_dict().items():
            entry = names.by_path.get((part, path))
            if entry is None:
                faults.append(f"{part}: {path} has no name in the checkpoint")
                continue
            explained.add(entry.key)
            shape = shapes.get(entry.key)
            if shape is None:
                faults.append(f"missing: {entry.key}")
            elif entry.shape_in_module(tuple(shape)) != tuple(parameter.shape):
                faults.append(f"other shape: {entry.key} is {list(shape)}, and {path} takes {list(parameter.shape)}")
    faults += [f"not known: {key}" for key in shapes if key not in explained]
    return list(dict.fromkeys(faults))


def _fill_buffers(module: torch.nn.Module) -> None:
    """Fill CLIP's position_ids, the one buffer that is not in checkpoints of every version."""
    for name, buffer in list(module.named_buffers()):
        if name.endswith("position_ids"):
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1]).expand(1, -1), persistent=False)
        elif buffer.is_meta:
            raise ValueError(f"the buffer {name} has no known content")


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored array (bfloat16 as bits) as a torch tensor of its own dtype."""
    if dtype == "BF16":
        return torch.from_numpy(array.view(np.int16).copy()).view(TORCH[dtype])
    return torch.from_numpy(array.copy())


def _in_module(entry: TensorMapping, value: torch.Tensor) -> torch.Tensor:
    if entry.form == "stacked":
        return value.chunk(3)[entry.third]
    if entry.form == "transposed":
        return value.T
    return value.reshape(value.shape[:2]) if entry.form == "conv1x1" else value


def to_checkpoint(modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by name, from the four modules, with SDXL's tensors that are no parameters (position_ids,
    logit_scale).
    """
    states = {part: module.state_dict() for part, module in modules.items()}
    tensors: dict[str, torch.Tensor] = {}
    for key, entries in TensorNameMap(Layout.of_modules(modules)).by_key.items():
        values = [states[entry.part].pop(entry.path) for entry in entries if entry.path in states[entry.part]]
        if not values:
            continue
        form, value = entries[0].form, values[0].detach()
        if form == "stacked":
            value = torch.cat(values)
        elif form == "transposed":
            value = value.T
        elif form == "conv1x1":
            value = value[:, :, None, None]
        tensors[key] = value.contiguous()
    if left := [f"{part}: {path}" for part, state in states.items() for path in state]:
        raise ValueError("\n".join(["no checkpoint name for", *first_lines(left)]))
    positions = len(tensors[PREFIX["te1"] + "embeddings.position_embedding.weight"])
    tensors[POSITION_IDS] = torch.arange(positions).expand(1, -1).contiguous()
    dtype = tensors[PREFIX["te2"] + "text_projection"].dtype
    tensors[LOGIT_SCALE] = torch.tensor(math.log(1 / 0.07), dtype=dtype)  # CLIP's initial temperature
    return tensors
