"""A toy SDXL for the tests: the miniature's dimensions, seeded weights, real tensor names."""

import torch

from kohaku_delta.formats import safetensors_io
from kohaku_delta.params import Model
from kohaku_delta.sdxl import model_loading

NORM_GROUPS = 4
MODEL = Model(head_dim=16, norm_groups=NORM_GROUPS, vae_scaling_factor=0.13025, side=128)
CONFIGS = {
    "unet": {
        "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (24, 48, 48),
        "layers_per_block": 2, "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 3, 3),
        "cross_attention_dim": 112, "use_linear_projection": True, "norm_num_groups": NORM_GROUPS,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    },
    "te1": {
        "vocab_size": 1000, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 3, "hidden_act": "quick_gelu", "bos_token_id": 998, "eos_token_id": 999,
        "pad_token_id": None, "max_position_embeddings": 77, "projection_dim": 48,
    },
    "te2": {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "hidden_act": "gelu", "bos_token_id": 998, "eos_token_id": 999, "pad_token_id": None,
        "max_position_embeddings": 77, "projection_dim": 64,
    },
    "vae": {
        "sample_size": 128, "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "block_out_channels": (12, 24, 32, 32),
        "layers_per_block": 2, "norm_num_groups": NORM_GROUPS, "scaling_factor": 0.13025, "force_upcast": True,
    },
}  # fmt: skip


def tensors(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A toy checkpoint's tensors; every parameter differs from zero and from its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    models = model_loading.build(CONFIGS)
    for module in models.values():
        state = {}
        for path, parameter in module.state_dict().items():
            near = 1.0 if "norm" in path.rsplit(".", 2)[-2] and path.endswith("weight") else 0.0
            state[path] = torch.randn(parameter.shape, generator=generator) * 0.05 + near
        module.load_state_dict(state, assign=True)
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in model_loading.to_checkpoint(models).items()
    }


def write(path, seed: int, dtype: torch.dtype = torch.float16, metadata=None) -> safetensors_io.WriteResult:
    return safetensors_io.save(path, {name: value.numpy() for name, value in tensors(seed, dtype).items()}, metadata)


def lokr(models, preset, seed: int = 0, **options):
    """LyCORIS's own modules on a toy's layers, with random weights: {name in the file: module}, none applied."""
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    from kohaku_delta.weights import lokr_preset as presets

    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for target in presets.lokr_targets(models, preset):
        layer = models[target.part].get_submodule(target.path)
        if target.algorithm == "norm":
            adapters[target.lora] = NormModule(target.lora, layer)
        else:
            settings = {"lora_dim": 10000, "alpha": 10000, "full_matrix": True} | options
            adapters[target.lora] = LokrModule(target.lora, layer, factor=target.factor, **settings)
        for weight in adapters[target.lora].parameters():
            weight.data = (torch.randn(weight.shape, generator=generator) * 0.1).half().float()
    return adapters
