import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.params import Bake
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tensor_names import Layout, TensorNameMap
from kohaku_delta.weights import bake, lokr_format

RECIPE = params.load(Path(__file__).parents[2] / "params.yaml")
ONE = Bake(scale=1.0, title="Toy", author=None, description=None, date=None, license=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base file, LoKr file, models, LyCORIS modules): the release's preset on a toy."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_sdxl.write(folder / "base.safetensors", 5)
    models = model_loading.load(folder / "base.safetensors", tiny_sdxl.MODEL)
    adapters = tiny_sdxl.lokr(models, RECIPE.lokr.preset)
    weights = {
        f"{name}.{suffix}": weight.detach().numpy()
        for name, adapter in adapters.items()
        for suffix, weight in adapter.named_parameters()
    }
    lokr_format.write_lokr(folder / "lokr.safetensors", weights, RECIPE, base.digest)
    return folder / "base.safetensors", folder / "lokr.safetensors", models, adapters


def merged_by_lycoris(models, adapters, scale=1.0):
    """{(part, parameter path): fp32 weight} as LyCORIS merges, on fp32 modules."""
    merged = {}
    for part, model in models.items():
        for path, module in model.named_modules():
            for adapter in adapters.values():
                if adapter.org_module[0] is module:
                    weight, bias = adapter.get_merged_weight(scale, shape=module.weight.shape)
                    merged[part, path + ".weight"] = weight.detach()
                    if bias is not None:
                        merged[part, path + ".bias"] = bias.detach()
    return merged


def test_baked_is_lycoris_merge_in_fp32_rounded_once_and_all_else_keeps_its_bits(trained, tmp_path):
    base, lokr_file, models, adapters = trained
    baked = bake.bake(base, lokr_file, ONE, 128, tmp_path / "out.safetensors")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    theirs = merged_by_lycoris(models, adapters)
    names = TensorNameMap(Layout.of(before))
    changed = set()
    for (part, path), weight in theirs.items():
        entry = names.by_path[part, path]
        ours = model_loading._in_module(entry, after[entry.key])
        assert torch.equal(ours, weight.half()), entry
        changed.add(entry.key)
    assert baked.tensors == len(changed)
    assert all(
        torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8))
        for key in before
        if key not in changed and before[key].ndim
    )


def test_same_bytes_for_any_piece_size_and_number_of_threads(trained, tmp_path):
    base, lokr_file, *_ = trained
    runs = [
        bake.bake(base, lokr_file, ONE, 128, tmp_path / "out.safetensors", numbers=numbers, threads=threads)
        for numbers, threads in ((500, 1), (1 << 20, 3), (3000, 2))
    ]
    assert len({run.written.sha256 for run in runs}) == 1


def test_forward_with_the_lokr_at_run_time_equals_the_baked_model(trained, tmp_path):
    base, lokr_file, *_ = trained
    bake.bake(base, lokr_file, ONE, 128, tmp_path / "out.safetensors")
    baked = model_loading.load(tmp_path / "out.safetensors", tiny_sdxl.MODEL)
    live = model_loading.load(base, tiny_sdxl.MODEL)
    adapters = tiny_sdxl.lokr(live, RECIPE.lokr.preset)
    for adapter in adapters.values():
        adapter.apply_to()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 998, (2, 77), generator=generator)
    ids[:, 20] = 999
    latents, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 112, generator=generator)
    added = {"text_embeds": torch.randn(2, 64, generator=generator), "time_ids": torch.full((2, 6), 128.0)}

    @torch.no_grad()
    def run(models):
        states = models["te1"](ids, output_hidden_states=True).hidden_states[-2], models["te2"](ids).text_embeds
        return *states, models["unet"](latents, torch.tensor([3, 700]), context, added_cond_kwargs=added).sample

    plain_models = model_loading.load(base, tiny_sdxl.MODEL)
    for ours, theirs, plain in zip(run(baked), run(live), run(plain_models), strict=True):
        assert torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * theirs.std())
        assert not torch.allclose(ours, plain, rtol=0.1, atol=0.1 * plain.std())


def one_entry(tmp_path, trained, tensors, metadata=None):
    with safetensors_io.open_file(trained[0]) as file:
        digest = file.digest()
    save_file(
        tensors, tmp_path / "one.safetensors", {lokr_format.BASE_DIGEST: digest} if metadata is None else metadata
    )
    return tmp_path / "one.safetensors"


LAYERS = [
    ("unet", "down_blocks.1.resnets.0.conv1"),
    ("unet", "mid_block.attentions.0.proj_in"),
    ("te2", "text_model.encoder.layers.1.self_attn.k_proj"),
]


@pytest.mark.parametrize("options", [{"lora_dim": 2, "alpha": 1}, {"lora_dim": 1, "alpha": 1, "decompose_both": True}])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("dora", [None, True, False])
def test_factored_tucker_and_dora_entries_are_baked_as_lycoris_computes_them(trained, tmp_path, options, tucker, dora):
    from lycoris.functional.general import weight_decompose
    from lycoris.functional.lokr import kron_weight
    from lycoris.modules.lokr import LokrModule

    base, _, models, _ = trained
    before, scale = load_file(base), 0.5
    names, generator = TensorNameMap(Layout.of(before)), torch.Generator().manual_seed(1)
    tensors, expected = {}, {}
    for part, path in LAYERS:
        layer, entry = models[part].get_submodule(path), names.by_path[part, path + ".weight"]
        adapter = LokrModule(
            "x", layer, factor=4, use_tucker=tucker, weight_decompose=dora is not None, wd_on_out=bool(dora), **options
        )
        for name, weight in adapter.named_parameters():
            weight.data = weight.data * 1.1 if name == "dora_scale" else torch.randn(weight.shape, generator=generator)
        stored = {suffix: value.detach().clone() for suffix, value in adapter.custom_state_dict().items()}
        tensors |= {f"{entry.lora}.{suffix}": value.contiguous() for suffix, value in stored.items()}
        # LyCORIS's training forward: alpha / rank once (its merge squares it)
        halves = (stored.get(f"lokr_{half}") for half in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
        delta = kron_weight(*halves, scale=adapter.scale).view(layer.weight.shape)
        if dora is None:
            expected[entry] = layer.weight + delta * scale
        else:
            expected[entry] = weight_decompose(layer.weight + delta, stored["dora_scale"], scale, bool(dora))
    bake.bake(
        base,
        one_entry(tmp_path, trained, tensors),
        ONE.model_copy(update={"scale": scale}),
        128,
        tmp_path / "out.safetensors",
    )
    after = load_file(tmp_path / "out.safetensors")
    for entry, weight in expected.items():
        assert torch.allclose(
            model_loading._in_module(entry, after[entry.key]).float(), weight, rtol=1e-3, atol=1e-4
        ), entry
    assert {key for key in after if not torch.equal(after[key], before[key])} == {entry.key for entry in expected}


def test_full_differences_and_the_transposed_projection_are_baked(trained, tmp_path):
    base = trained[0]
    before = load_file(base)
    generator = torch.Generator().manual_seed(1)
    diffs = {
        "lora_te2_text_projection.diff": torch.randn(64, 64, generator=generator),
        "lora_unet_down_blocks_0_resnets_0_conv1.diff": torch.randn(
            24, 24, 3, 3, generator=generator
        ),  # diffusers' name
        "lora_unet_down_blocks_0_resnets_0_conv1.diff_b": torch.randn(24, generator=generator),
        "lora_te1_encoder_layers_0_mlp_fc1.diff_b": torch.randn(96, generator=generator),  # transformers 5's name
        "lycoris_mid_block_attentions_0_proj_in.diff": torch.randn(48, 48, generator=generator),  # SimpleTuner's name
    }
    bake.bake(base, one_entry(tmp_path, trained, diffs), ONE, 128, tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    unet, te1, te2 = (
        "model.diffusion_model.input_blocks.1.0.in_layers.2",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
        "conditioner.embedders.1.model.text_projection",
    )
    expected = {
        te2: diffs["lora_te2_text_projection.diff"].T,
        f"{unet}.weight": diffs["lora_unet_down_blocks_0_resnets_0_conv1.diff"],
    }
    expected["model.diffusion_model.middle_block.1.proj_in.weight"] = diffs[
        "lycoris_mid_block_attentions_0_proj_in.diff"
    ]
    expected |= {
        f"{unet}.bias": diffs["lora_unet_down_blocks_0_resnets_0_conv1.diff_b"],
        f"{te1}.bias": diffs["lora_te1_encoder_layers_0_mlp_fc1.diff_b"],
    }
    for key, value in after.items():
        assert torch.equal(value, (before[key].float() + expected[key]).half() if key in expected else before[key]), key


def test_another_base_is_refused_and_force_overrules(trained, tmp_path):
    _, lokr_file, *_ = trained
    tiny_sdxl.write(tmp_path / "other.safetensors", 6)
    with pytest.raises(UserError, match="was trained on another base"):
        bake.bake(tmp_path / "other.safetensors", lokr_file, ONE, 128, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors"]
    bake.bake(tmp_path / "other.safetensors", lokr_file, ONE, 128, tmp_path / "out.safetensors", force=True)


def test_the_same_base_in_another_container_is_the_same_base(trained, tmp_path):
    base, lokr_file, *_ = trained
    save_file(load_file(base), tmp_path / "same.safetensors", {"note": "other header, other bytes"})
    ours, theirs = (
        bake.bake(path, lokr_file, ONE, 128, tmp_path / "out.safetensors")
        for path in (base, tmp_path / "same.safetensors")
    )
    assert ours.written == theirs.written


def test_a_base_with_infinity_in_a_tensor_that_no_entry_changes_is_refused(trained, tmp_path):
    tensors = load_file(trained[0])
    tensors["first_stage_model.decoder.conv_out.bias"][1] = torch.inf
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="decoder.conv_out.bias holds NaN or infinity: .*bad.safetensors is damaged"):
        bake.bake(tmp_path / "bad.safetensors", trained[1], ONE, 128, tmp_path / "out.safetensors", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_no_word_about_the_base_needs_force(trained, tmp_path):
    one = one_entry(tmp_path, trained, {"lora_te2_text_projection.diff": torch.zeros(64, 64)}, metadata={})
    with pytest.raises(UserError, match="does not say which base"):
        bake.bake(trained[0], one, ONE, 128, tmp_path / "out.safetensors")
    bake.bake(trained[0], one, ONE, 128, tmp_path / "out.safetensors", force=True)


CONV = "lora_unet_input_blocks_1_0_in_layers_2"


@pytest.mark.parametrize(
    "tensors, said",
    [
        (
            {"lora_unet_nowhere.lokr_w1": torch.zeros(2, 2), "lora_unet_nowhere.lokr_w2": torch.zeros(2, 2)},
            "lora_unet_nowhere match no tensor",
        ),
        (
            {f"{CONV}.lokr_w1": torch.zeros(8, 8), f"{CONV}.lokr_w2": torch.zeros(4, 4, 3, 3)},
            "was trained on a model with another architecture",
        ),
        (
            {f"{CONV}.lokr_w1": torch.zeros(8, 8), f"{CONV}.lokr_w2": torch.full((3, 3, 3, 3), torch.nan)},
            "lokr_w2 holds NaN",
        ),
        (
            {f"{CONV}.lokr_w1": torch.full((8, 8), 300.0), f"{CONV}.lokr_w2": torch.full((3, 3, 3, 3), 300.0)},
            "would hold NaN or infinity as F16",
        ),
        ({f"{CONV}.lokr_w1": torch.zeros(8, 8)}, "has no lokr_w2_a"),
        ({f"{CONV}.lora_up.weight": torch.zeros(8, 8)}, "is a LoRA"),
        (
            {
                f"{CONV}.diff": torch.zeros(24, 24, 3, 3),
                "lora_unet_down_blocks_0_resnets_0_conv1.diff": torch.zeros(24, 24, 3, 3),
            },
            "two names of one layer",
        ),
    ],
)
def test_an_entry_that_does_not_fit_is_named_and_nothing_is_left(trained, tmp_path, tensors, said):
    one = one_entry(tmp_path, trained, tensors)
    with pytest.raises(UserError, match=said):
        bake.bake(trained[0], one, ONE, 128, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [one]


def test_an_infinite_alpha_is_harmless_where_both_halves_are_whole(trained, tmp_path):
    tensors = {
        f"{CONV}.lokr_w1": torch.ones(8, 8),
        f"{CONV}.lokr_w2": torch.ones(3, 3, 3, 3),
        f"{CONV}.alpha": torch.tensor(torch.inf),
    }
    bake.bake(trained[0], one_entry(tmp_path, trained, tensors), ONE, 128, tmp_path / "out.safetensors")
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(load_file(tmp_path / "out.safetensors")[key], (load_file(trained[0])[key].float() + 1).half())


def test_a_bfloat16_base_stays_bfloat16(trained, tmp_path):
    wide = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in load_file(trained[0]).items()
    }
    save_file(wide, tmp_path / "base.safetensors")
    bake.bake(tmp_path / "base.safetensors", trained[1], ONE, 128, tmp_path / "out.safetensors", force=True)
    after = load_file(tmp_path / "out.safetensors")
    key, stored = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight", load_file(trained[1])
    delta = torch.kron(stored[f"{CONV}.lokr_w1"].float()[..., None, None], stored[f"{CONV}.lokr_w2"].float())
    assert torch.equal(after[key], (wide[key].float() + delta).bfloat16())


def test_by_hand_a_wrong_base_is_one_sentence_and_exit_code_1(trained, tmp_path):
    root = Path(__file__).parents[2]
    tiny_sdxl.write(tmp_path / "other.safetensors", 6)

    def stage(base):
        command = [
            sys.executable,
            root / "stages" / "bake.py",
            "--params",
            root / "params.yaml",
            "--base",
            base,
            "--lokr",
            trained[1],
            "--out",
            tmp_path / "out.safetensors",
        ]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    refused = stage(tmp_path / "other.safetensors")
    assert (
        refused.returncode == 1
        and refused.stdout == ""
        and re.fullmatch(r"Error: .*was trained on another base.*\n", refused.stderr)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]
    done = stage(trained[0])
    assert (
        done.returncode == 0 and done.stderr == "" and done.stdout.startswith("bake: ") and done.stdout.count("\n") == 1
    )


def test_the_header_says_what_programs_look_for_and_the_hash_of_the_contents_is_modelspecs(trained, tmp_path):
    base, lokr_file, *_ = trained
    recipe = RECIPE.bake.model_copy(update={"date": "2024-03-05", "license": None})
    written = bake.bake(base, lokr_file, recipe, 1024, tmp_path / "out.safetensors").written
    raw = (tmp_path / "out.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    said = json.loads(raw[8:start])["__metadata__"]
    must = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}
    should = {"description", "author", "date", "hash_sha256"}
    assert {f"modelspec.{name}" for name in must | should | {"prediction_type"}} | {"format"} == set(said)
    assert said["modelspec.resolution"] == "1024x1024" and said["modelspec.date"] == "2024-03-05"
    assert said["modelspec.prediction_type"] == "epsilon"
    assert said["modelspec.hash_sha256"] == "0x" + hashlib.sha256(raw[start:]).hexdigest()
    assert written.sha256 == hashlib.sha256(raw).hexdigest() and written.bytes == len(raw)
    assert bake.bake(base, lokr_file, recipe, 1024, tmp_path / "again.safetensors").written == written


def test_a_date_that_is_none_is_refused():
    for date in ("2024-03-05", "2024-03-05T10:00:00Z", None):
        assert Bake.model_validate(ONE.model_dump() | {"date": date}).date == date
    for date in ("5.3.2024", "today", ""):
        with pytest.raises(ValueError, match="ISO 8601|at least 1"):
            Bake.model_validate(ONE.model_dump() | {"date": date})
