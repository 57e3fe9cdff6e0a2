"""The settings that are published are read by other programs' own readers, and mean there what they mean here."""

import ast
import json
import os
import tomllib
from pathlib import Path

import pytest
import toml
import torch
from lycoris import kohya
from lycoris.config_sdk import PresetConfig
from lycoris.utils.preset import read_preset

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.publishing import kohya_settings
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tensor_names import PREFIX, Layout, TensorNameMap
from kohaku_delta.weights import lokr_preset

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ["params.yaml", "miniature/params.yaml", "pilot/params.yaml"]
OPTIONS = json.loads(Path(__file__).with_name("sd_scripts_options.json").read_text())
THEIRS = {"Attention": "CrossAttention"} | {
    name: name for name in ("FeedForward", "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
}


def release() -> params.Recipe:
    return params.load(ROOT / "params.yaml")


def flat(text: str) -> dict:
    """As sd-scripts' read_config_from_file joins the sections."""
    return {key: value for section in toml.loads(text).values() for key, value in section.items()}


@pytest.mark.parametrize("version", OPTIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_is_an_option_of_sd_scripts_with_a_value_of_its_type(recipe, version):
    text = kohya_settings.training_toml(params.load(ROOT / recipe))
    assert toml.loads(text) == tomllib.loads(text)
    kinds = {"int": int, "float": float, "str": str, "flag": bool, "list": list}
    for key, value in flat(text).items():
        kind = OPTIONS[version][key]
        allowed = (int, float) if kind in ("float", "int_or_float") or key == "text_encoder_lr" else kinds[kind]
        assert isinstance(value, allowed), key


def test_the_releases_settings_are_the_published_ones():
    settings = flat(kohya_settings.training_toml(release()))
    published = {
        "train_batch_size": 4, "gradient_accumulation_steps": 16, "lr_warmup_steps": 100, "unet_lr": 4e-5,
        "text_encoder_lr": 1e-5, "lr_scheduler": "constant_with_warmup", "max_train_epochs": 1, "seed": 1337,
        "resolution": "1024,1024", "min_bucket_reso": 256, "max_bucket_reso": 4096, "bucket_reso_steps": 64,
        "max_token_length": 225, "noise_offset": 0.05, "min_snr_gamma": 5.0, "mixed_precision": "fp16",
        "full_fp16": True, "save_precision": "fp16", "save_every_n_steps": 2000, "network_dim": 10000,
        "network_alpha": 10000.0, "network_module": "lycoris.kohya", "optimizer_type": "Lion8bit",
        "max_grad_norm": 1.0, "keep_tokens_separator": "|||", "caption_tag_dropout_rate": 0.1, "shuffle_caption": True,
        "output_name": "kohaku-xl-delta-lyco", "caption_extension": ".txt",
    }  # fmt: skip
    assert published.items() <= settings.items()
    arguments = {
        key: ast.literal_eval(value) for key, value in (word.split("=") for word in settings["optimizer_args"])
    }
    assert arguments == {"weight_decay": 0.1, "betas": (0.9, 0.95)}


def test_a_training_that_began_with_a_lokr_names_it_and_another_does_not():
    recipe = release()
    start = params.Pin(url="file://../release/lyco-ckpts/lyco.safetensors", bytes=None, sha256=None)
    inputs = {**recipe.download.inputs, "network_weights": start}
    later = recipe.model_copy(update={"download": recipe.download.model_copy(update={"inputs": inputs})})
    text = kohya_settings.training_toml(later)
    assert flat(text)["network_weights"] == "lyco.safetensors" and "# It began with the LoKr file://../release" in text
    assert OPTIONS["v0.8.3"]["network_weights"] == "str"
    assert "network_weights" not in kohya_settings.training_toml(recipe)


@pytest.mark.parametrize(
    "area, step, expected",
    [(1048576, 64, "1024,1024"), (16384, 32, "128,128"), (98304, 64, "256,384"), (1000003, 64, "1000,1000")],
)
def test_the_resolution_gives_sd_scripts_the_area_of_the_buckets(area, step, expected):
    assert kohya_settings._resolution(area, step) == expected


def test_lycoris_reads_the_preset_and_knows_all_of_its_options(tmp_path):
    (tmp_path / "preset.toml").write_text(kohya_settings.preset_toml(release().lokr.preset))
    preset = PresetConfig.from_dict(read_preset(str(tmp_path / "preset.toml")), strict=True)
    assert preset.module_algo_map["FeedForward"].to_dict() == {"algo": "lokr", "factor": 2}
    assert len(preset.name_algo_map) == 4


def sd_scripts_unet(unet: torch.nn.Module, names: TensorNameMap) -> torch.nn.Module:
    """The layers of diffusers' U-Net in a tree with the paths and class names of sd-scripts' U-Net."""
    paths = {
        path: names.by_path["unet", f"{path}.weight"].key.removeprefix(PREFIX["unet"]).removesuffix(".weight")
        for path, module in unet.named_modules()
        if hasattr(module, "weight")
    }
    classes = {}
    for path, module in unet.named_modules():
        inside = [theirs.split(".") for ours, theirs in paths.items() if ours.startswith(path + ".")]
        if type(module).__name__ in THEIRS and inside:
            common = os.path.commonprefix(inside) if len(inside) > 1 else inside[0][:-1]
            classes[".".join(common)] = THEIRS[type(module).__name__]
    tree = torch.nn.Module()
    for ours, theirs in sorted(paths.items(), key=lambda item: item[1]):
        node, parts = tree, theirs.split(".")
        for depth, part in enumerate(parts[:-1], 1):
            if part not in node._modules:
                name = classes.get(".".join(parts[:depth]), "Sequential")
                node.add_module(part, type(name, (torch.nn.Module,), {})())
            node = node._modules[part]
        node.add_module(parts[-1], unet.get_submodule(ours))
    return tree


@pytest.mark.parametrize("patterns", [True, False], ids=["LyCORIS 4.1", "LyCORIS 2.1"])
def test_lycoris_trains_the_layers_with_the_factors_that_the_recipe_names(tmp_path, monkeypatch, patterns):
    recipe, models = release(), model_loading.build(tiny_sdxl.CONFIGS)
    preset = toml.loads(kohya_settings.preset_toml(recipe.lokr.preset))
    if not patterns:  # LyCORIS 2.1 takes the keys of name_algo_map for whole names, of which none is one
        preset["name_algo_map"] = {}
    (tmp_path / "preset.toml").write_text(toml.dumps(preset))
    arguments = dict(word.split("=") for word in flat(kohya_settings.training_toml(recipe))["network_args"])
    arguments["preset"] = str(tmp_path / "preset.toml")
    for name in list(vars(kohya.LycorisNetworkKohya)):  # apply_preset writes into the class
        if name.isupper():
            monkeypatch.setattr(kohya.LycorisNetworkKohya, name, getattr(kohya.LycorisNetworkKohya, name))
    unet = sd_scripts_unet(models["unet"], TensorNameMap(Layout.of_modules(models)))
    network = kohya.create_network(1.0, 10000, 10000.0, None, [models["te1"], models["te2"]], unet, **arguments)

    def described(modules) -> dict:
        return {
            module.lora_name.replace("text_model_", ""): (  # transformers 5 took it out of text encoder 1's paths
                type(module).__name__, sorted((name, tuple(value.shape)) for name, value in module.named_parameters())
            )
            for module in modules
        }  # fmt: skip

    own = [
        (target, tiny)
        for target, tiny in zip(
            lokr_preset.lokr_targets(models, recipe.lokr.preset),
            tiny_sdxl.lokr(models, recipe.lokr.preset).values(),
            strict=True,
        )
    ]
    trained = [*network.text_encoder_loras, *network.unet_loras]
    assert len(trained) == len(described(trained)), "no layer is trained twice"
    assert described(trained) == described(module for _, module in own)
