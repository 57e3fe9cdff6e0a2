"""The table of names, held against what others know of SDXL: diffusers' conversion, LyCORIS's converter, a public list
of the checkpoint's tensors.
"""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_names

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.params import Model, Preset
from kohaku_delta.sdxl import model_loading, tensor_names
from kohaku_delta.weights import lokr_preset

SDXL = Model(head_dim=64, norm_groups=32, vae_scaling_factor=0.13025, side=1024)
PRESET = params.load(Path(__file__).parents[2] / "params.yaml").lokr.preset
CLIP = {
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": None,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
CONFIGS = {
    "unet": tiny_sdxl.CONFIGS["unet"]
    | {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "norm_num_groups": 32,
        "projection_class_embeddings_input_dim": 2816,
    },
    "te1": CLIP
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "te2": CLIP
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "vae": tiny_sdxl.CONFIGS["vae"]
    | {
        "sample_size": 1024,
        "block_out_channels": (128, 256, 512, 512),
        "norm_num_groups": 32,
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
    },
}


@pytest.fixture(scope="module")
def sdxl():
    """SDXL's four modules without numbers, and the checkpoint that they make."""
    models = model_loading.build(CONFIGS)
    return models, model_loading.to_checkpoint(models)


def test_sdxls_2515_tensors_have_the_names_and_shapes_that_sd_mecha_lists(sdxl):
    # sd-mecha's model config sdxl-sgm, without its optional denoiser and schedule tensors
    listed = "".join(f"{name} {list(value.shape)}\n" for name, value in sorted(sdxl[1].items()))
    assert len(sdxl[1]) == 2515
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "2086c2ba91745f921763779e5e7d19ed40cf689f25c1dd929bb509a000f8cb6e"
    )


def test_every_tensor_of_sdxl_is_explained_and_none_is_wanting(sdxl):
    table = tensor_names.TensorNameMap(tensor_names.Layout.of(sdxl[1]))
    assert table.layout == tensor_names.SDXL == tensor_names.Layout.of_modules(sdxl[0])
    assert table.unknown(sdxl[1]) == [] and table.missing(sdxl[1]) == []
    assert table.missing(set(sdxl[1]) - {"model.diffusion_model.out.2.bias"}) == ["model.diffusion_model.out.2.bias"]
    assert table.unknown([*sdxl[1], "model_ema.decay"]) == ["model_ema.decay"]


def test_architecture_is_read_off_the_shapes(sdxl):
    shapes = {name: tuple(value.shape) for name, value in sdxl[1].items()}
    configs = model_loading.architecture(shapes, SDXL)
    for part, config in CONFIGS.items():
        assert configs[part] == configs[part] | config
    assert model_loading.shape_faults(tensor_names.TensorNameMap(tensor_names.Layout.of(shapes)), sdxl[0], shapes) == []


def converted_by_diffusers(checkpoint, models):
    """{part: state dict} of a checkpoint as diffusers' own loader converts it."""
    te2 = diffusers_names.convert_open_clip_checkpoint(models["te2"], checkpoint, prefix=tensor_names.PREFIX["te2"])
    return {
        "unet": diffusers_names.convert_ldm_unet_checkpoint(dict(checkpoint), models["unet"].config),
        "vae": diffusers_names.convert_ldm_vae_checkpoint(dict(checkpoint), models["vae"].config),
        "te1": {
            path.removeprefix("text_model."): value
            for path, value in diffusers_names.convert_ldm_clip_checkpoint(checkpoint).items()
        },
        "te2": te2,
    }


def test_full_sdxl_converts_as_diffusers_converts_it(sdxl):
    models, checkpoint = sdxl
    for part, theirs in converted_by_diffusers(checkpoint, models).items():
        theirs.pop("embeddings.position_ids", None)
        assert {path: value.shape for path, value in theirs.items()} == {
            path: value.shape for path, value in models[part].state_dict().items()
        }


def test_a_toys_numbers_arrive_where_diffusers_puts_them(tmp_path):
    tiny_sdxl.write(tmp_path / "toy.safetensors", 3)
    checkpoint, models = tiny_sdxl.tensors(3), model_loading.load(tmp_path / "toy.safetensors", tiny_sdxl.MODEL)
    for part, theirs in converted_by_diffusers(checkpoint, models).items():
        for path, value in models[part].state_dict().items():
            assert torch.equal(value, theirs[path].float()), path
    back = model_loading.to_checkpoint(models)
    assert back.keys() == checkpoint.keys()
    assert all(
        torch.equal(back[name], value.to(back[name].dtype))
        for name, value in checkpoint.items()
        if name != tensor_names.LOGIT_SCALE
    )


def test_preset_trains_264_text_encoder_and_1050_unet_entries_of_384645360_parameters(sdxl):
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    models, _ = sdxl
    targets = lokr_preset.lokr_targets(models, PRESET)
    count = {part: sum(target.part == part for target in targets) for part in ("te1", "te2", "unet")}
    assert (count["te1"] + count["te2"], count["unet"]) == (264, 1050)
    assert len({target.lora for target in targets}) == 1314
    numbers = 0
    with torch.device("meta"):
        for target in targets:
            layer = models[target.part].get_submodule(target.path)
            made = (
                NormModule("x", layer)
                if target.algorithm == "norm"
                else LokrModule("x", layer, lora_dim=10000, alpha=10000, factor=target.factor, full_matrix=True)
            )
            numbers += sum(weight.numel() for weight in made.parameters())
    assert numbers == 384_645_360


def test_lokr_names_are_those_of_lycoris_where_its_converter_knows_the_layer(sdxl):
    from lycoris.utils import convert_diffusers_name_to_compvis

    for target in lokr_preset.lokr_targets(sdxl[0], PRESET):
        if target.part == "unet" and not target.path.startswith(("add_embedding", "conv_norm_out")):
            assert convert_diffusers_name_to_compvis("lora_unet_" + target.path.replace(".", "_")) == target.lora
    loras = {target.lora for target in lokr_preset.lokr_targets(sdxl[0], PRESET)}
    assert {
        "lora_unet_label_emb_0_0",
        "lora_unet_label_emb_0_2",
        "lora_unet_out_0",
        "lora_unet_out_2",
        "lora_unet_time_embed_0",
    } < loras
    assert {
        "lora_te1_text_model_encoder_layers_11_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    } < loras
    assert {
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_0_skip_connection",
        "lora_unet_output_blocks_2_2_conv",
    } < loras


def test_every_lokr_name_is_one_that_comfyui_and_webui_look_for(sdxl):
    # docs/tensor-names.md says where these rules were read
    weights = {key.removesuffix(".weight") for key in sdxl[1] if key.endswith(".weight")}
    unet, te1, te2 = (
        "model.diffusion_model.",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.",
        "conditioner.embedders.1.model.transformer.resblocks.",
    )
    six = {f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")} | {"mlp.fc1", "mlp.fc2"}
    comfyui = {"lora_unet_" + key.removeprefix(unet).replace(".", "_") for key in weights if key.startswith(unet)}
    for part, layers in (("te1", 12), ("te2", 32)):
        comfyui |= {
            f"lora_{part}_text_model_encoder_layers_{layer}_{name.replace('.', '_')}"
            for layer in range(layers)
            for name in six
        }
    webui = {"diffusion_model_" + key.removeprefix(unet).replace(".", "_") for key in weights if key.startswith(unet)}
    webui |= {
        "0_transformer_text_model_encoder_layers_" + key.removeprefix(te1).replace(".", "_")
        for key in weights
        if key.startswith(te1)
    }
    open_clip = {"mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj", "self_attn_out_proj": "attn_out_proj"} | {
        f"self_attn_{x}_proj": "attn" for x in "qkv"
    }
    webui |= {
        "1_model_transformer_resblocks_" + key.removeprefix(te2).rpartition(".in_proj")[0].replace(".", "_")
        for key in sdxl[1]
        if key.startswith(te2) and ".in_proj_" in key
    }
    webui |= {
        "1_model_transformer_resblocks_" + key.removeprefix(te2).replace(".", "_")
        for key in weights
        if key.startswith(te2)
    }
    for target in lokr_preset.lokr_targets(sdxl[0], PRESET):
        assert target.lora in comfyui
        kind, _, rest = target.lora.removeprefix("lora_").partition("_")
        if kind == "te2":
            layer, _, name = rest.removeprefix("text_model_encoder_layers_").partition("_")
            assert f"1_model_transformer_resblocks_{layer}_{open_clip[name]}" in webui
        else:
            assert {"unet": "diffusion_model_", "te1": "0_transformer_"}[kind] + rest in webui


def test_every_lokr_name_of_the_preset_leads_back_to_its_tensor(sdxl):
    table = tensor_names.TensorNameMap(tensor_names.SDXL)
    modules_by_lora = table.by_lora()
    for target in lokr_preset.lokr_targets(sdxl[0], PRESET):
        weight, bias = modules_by_lora[target.lora]
        assert (weight.part, weight.path) == (target.part, target.path + ".weight") and weight.key in sdxl[1]
        assert bias is None or bias.key in sdxl[1] or bias.key.endswith((".to_q.bias", ".to_k.bias", ".to_v.bias"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"modules": {"CrossAttention": 4, "MissingBlock": 2}}, "MissingBlock"),
        ({"names": {"out": 8, "nowhere": 8}}, "nowhere matches no layer"),
    ],
)
def test_a_preset_target_that_matches_nothing_is_named(sdxl, change, said):
    with pytest.raises(UserError, match=said):
        lokr_preset.lokr_targets(sdxl[0], Preset(**(PRESET.model_dump() | change)))


def test_a_name_meets_whole_components_only(sdxl):
    only = Preset(modules={}, names={"out": 8}, norms=True)
    assert [target.lora for target in lokr_preset.lokr_targets(sdxl[0], only)] == ["lora_unet_out_0", "lora_unet_out_2"]


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["lora_unet_out_2.alpha"],
        ["model.diffusion_model.input_blocks.99999999999.0.weight"],
        [f"model.diffusion_model.input_blocks.{i}.0.op.weight" for i in range(3)]
        + ["model.diffusion_model.middle_block.1.transformer_blocks.4000000000.norm1.weight"],
        ["model.diffusion_model.input_blocks." + "9" * 5000 + ".0.weight"],
    ],
)
def test_keys_of_something_else_are_refused(keys):
    with pytest.raises(UserError, match="not an SDXL checkpoint"):
        tensor_names.Layout.of(keys)
