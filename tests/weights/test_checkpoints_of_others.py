"""Checkpoints as other programs write them: taken as they were meant, or refused with a remedy, by all stages."""

import hashlib
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.cli.main import main
from kohaku_delta.errors import UserError
from kohaku_delta.params import Bake
from kohaku_delta.sdxl import model_loading
from kohaku_delta.weights import bake, export_diffusers, lokr_format, merge

MERGE = params.load("params.yaml").merge
RECIPE = params.load("params.yaml")
DROP = MERGE.model_copy(update={"extra_tensors": "drop"})
ONE = Bake(scale=1.0, title="Toy", author=None, description=None, date=None, license=None)
IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
OUT = "model.diffusion_model.out.2.weight"
EXTRA = {
    "model_ema.decay": torch.zeros(()),
    **{f"model_ema.diffusion_model{index}": torch.zeros(4, 4) for index in range(9)},
    "denoiser.sigmas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    "conditioner.embedders.0.transformer.text_projection.weight": torch.zeros(48, 48),
    "conditioner.embedders.0.logit_scale": torch.zeros(()),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    tiny_sdxl.write(path, 3)
    return path


@pytest.fixture(scope="module")
def lokr(tmp_path_factory, base):
    path = tmp_path_factory.mktemp("lokr") / "lokr.safetensors"
    model = model_loading.load(base, tiny_sdxl.MODEL)
    adapters = tiny_sdxl.lokr(model, RECIPE.lokr.preset)
    weights = {
        f"{name}.{suffix}": weight.detach().numpy()
        for name, adapter in adapters.items()
        for suffix, weight in adapter.named_parameters()
    }
    lokr_format.write_lokr(path, weights, RECIPE, "0" * 64)
    return path


def changed(base, path, tensors=None, metadata=None):
    save_file(load_file(base) | (tensors or {}), path, metadata)
    return path


def every_reader(checkpoint, base, lokr, out):
    """What each stage does with a checkpoint, by the stage's name."""
    tokenizers = dict.fromkeys(export_diffusers.PADS, (out.parent / "vocab.json", out.parent / "merges.txt"))
    return {
        "merge, a parent": lambda: merge.merge(base, {"gamma": checkpoint, "beta": base}, MERGE, out),
        "merge, the donor": lambda: merge.merge(checkpoint, {"gamma": base, "beta": base}, MERGE, out),
        "merge, published": lambda: merge.copy_published_base(checkpoint, None, out),
        "bake --force": lambda: bake.bake(checkpoint, lokr, ONE, 128, out, force=True),
        "export": lambda: export_diffusers.export(checkpoint, tokenizers, tiny_sdxl.MODEL, out),
        "training and preview": lambda: model_loading.load(checkpoint, tiny_sdxl.MODEL),
    }


@pytest.mark.parametrize(
    "tensors, metadata, sign",
    [
        ({"v_pred": torch.zeros(0)}, None, "the tensor 'v_pred'"),
        ({"ztsnr": torch.zeros(0)}, None, "the tensor 'ztsnr'"),
        ({"edm_vpred.sigma_max": torch.ones(())}, None, "the tensor 'edm_vpred.sigma_max'"),
        ({"edm_mean": torch.zeros(1, 4, 1, 1)}, None, "the tensor 'edm_mean'"),
        (None, {"modelspec.prediction_type": "v"}, "modelspec.prediction_type: 'v'"),
        (None, {"modelspec.prediction_type": "v_prediction"}, "modelspec.prediction_type"),
        (None, {"ss_v_parameterization": "True"}, "ss_v_parameterization"),
        (None, {"ss_zero_terminal_snr": "True"}, "ss_zero_terminal_snr"),
    ],
)
def test_what_says_that_it_predicts_v_is_refused_by_every_stage(base, lokr, tmp_path, tensors, metadata, sign):
    checkpoint = changed(base, tmp_path / "v.safetensors", tensors, metadata)
    for stage, read in every_reader(checkpoint, base, lokr, tmp_path / "out").items():
        with pytest.raises(UserError, match="not an epsilon-prediction model") as refusal:
            read()
        assert sign in refusal.value.message, stage
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_a_lokr_of_a_v_prediction_training_is_refused(base, lokr, tmp_path):
    save_file(load_file(lokr), tmp_path / "v.safetensors", {"ss_v_parameterization": "True"})
    with pytest.raises(UserError, match="not an epsilon-prediction model"):
        bake.bake(base, tmp_path / "v.safetensors", ONE, 128, tmp_path / "out.safetensors", force=True)


def test_what_says_that_it_predicts_epsilon_is_taken(base, tmp_path):
    said = {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}
    model_loading.load(changed(base, tmp_path / "e.safetensors", None, said), tiny_sdxl.MODEL)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_that_cannot_be_computed_with_are_refused_by_every_stage(base, lokr, tmp_path, dtype):
    small = {OUT: load_file(base)[OUT].to(dtype)}
    checkpoint = changed(base, tmp_path / "small.safetensors", small)
    for read in every_reader(checkpoint, base, lokr, tmp_path / "out").values():
        with pytest.raises(
            UserError, match=f"{OUT} is (F8_E4M3|F8_E5M2|I8), and weights of F16, BF16, F32, F64 are read"
        ):
            read()


@pytest.mark.parametrize(
    "names",
    [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ),
        ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.token_embedding.weight"),
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
    ],
    ids=["SD 1.5", "SDXL's refiner", "Flux"],
)
def test_a_checkpoint_of_another_architecture_is_called_so_and_no_option_is_offered(tmp_path, names):
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not an SDXL checkpoint") as refusal:
        merge.copy_published_base(tmp_path / "other.safetensors", None, tmp_path / "out.safetensors")
    assert "drop" not in refusal.value.message
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_part_of_sdxl_is_named_with_its_remedy_and_left_out_by_it(base, tmp_path):
    checkpoint = changed(base, tmp_path / "more.safetensors", EXTRA)
    phrase = "model_ema.* (10)"
    for parents in ((base, checkpoint), (checkpoint, base)):
        with pytest.raises(UserError, match="not part of SDXL: .*alphas_cumprod.*merge.extra_tensors: drop") as refusal:
            merge.merge(parents[0], {"gamma": parents[1], "beta": base}, MERGE, tmp_path / "out.safetensors")
        assert phrase in refusal.value.message
        merged = merge.merge(parents[0], {"gamma": parents[1], "beta": base}, DROP, tmp_path / "out.safetensors")
        plain = merge.merge(base, {"gamma": base, "beta": base}, DROP, tmp_path / "plain.safetensors")
        assert merged.written == plain.written and plain.notes == []
        assert len(merged.notes) == 1 and phrase in merged.notes[0] and "text_projection" in merged.notes[0]
    with pytest.raises(UserError, match="merge.extra_tensors: drop"):
        merge.copy_published_base(checkpoint, None, tmp_path / "out.safetensors")
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    copied = merge.copy_published_base(checkpoint, sha256, tmp_path / "out.safetensors", drop_extra=True)
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(base).keys() and phrase in copied.notes[0]
    with pytest.raises(UserError, match="was expected"):
        merge.copy_published_base(checkpoint, "0" * 64, tmp_path / "out.safetensors", drop_extra=True)


def test_training_and_preview_name_the_remedy_for_what_is_no_part_of_sdxl(base, tmp_path):
    checkpoint = changed(base, tmp_path / "more.safetensors", EXTRA)
    with pytest.raises(UserError, match="not known: alphas_cumprod(.|\n)*merge.extra_tensors: drop"):
        model_loading.load(checkpoint, tiny_sdxl.MODEL)


def test_an_unknown_tensor_inside_a_part_is_refused_however_it_is_asked(base, tmp_path):
    more = changed(base, tmp_path / "more.safetensors", {"model.diffusion_model.adapter.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="not known: model.diffusion_model.adapter.weight"):
        merge.merge(base, {"gamma": more, "beta": base}, DROP, tmp_path / "out.safetensors")


def test_export_leaves_out_what_is_no_part_of_sdxl_if_asked(base, tmp_path):
    checkpoint = changed(base, tmp_path / "more.safetensors", EXTRA)
    words = ["!", *(f"w{index}" for index in range(997)), export_diffusers.BEGIN, export_diffusers.END]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    both = dict.fromkeys(export_diffusers.PADS, (tmp_path / "vocab.json", tmp_path / "merges.txt"))
    with pytest.raises(UserError, match="--drop-extra leaves them out"):
        export_diffusers.export(checkpoint, both, tiny_sdxl.MODEL, tmp_path / "out")
    exported = export_diffusers.export(checkpoint, both, tiny_sdxl.MODEL, tmp_path / "out", drop_extra=True)
    assert sorted(EXTRA) == exported.left_out
    export_diffusers.export(base, both, tiny_sdxl.MODEL, tmp_path / "plain")
    for path in (tmp_path / "plain").rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "plain")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "broken",
    [
        torch.arange(77).float()[None] + 0.01,
        torch.arange(77).half()[None],
        torch.zeros(1, 77, dtype=torch.int64),
        torch.arange(77, dtype=torch.int32)[None],
    ],
    ids=["rounded wrong", "float16", "zeros", "int32"],
)
def test_broken_position_ids_become_0_to_76(base, tmp_path, broken):
    bad = changed(base, tmp_path / "bad.safetensors", {IDS: broken})
    merged = merge.merge(bad, {"gamma": base, "beta": base}, MERGE, tmp_path / "donor.safetensors")
    copied = merge.copy_published_base(bad, None, tmp_path / "published.safetensors")
    for result, path in ((merged, "donor"), (copied, "published")):
        with safe_open(tmp_path / f"{path}.safetensors", "pt") as file:
            ids = file.get_tensor(IDS)
        assert ids.dtype == torch.int64 and ids.tolist() == [list(range(77))]
        assert len(result.notes) == 1 and "was repaired" in result.notes[0]
    right = merge.merge(base, {"gamma": base, "beta": base}, MERGE, tmp_path / "right.safetensors")
    assert right.written == merged.written and right.notes == []
    others = load_file(tmp_path / "published.safetensors")
    assert all(torch.equal(value, others[name]) for name, value in load_file(base).items())


def test_a_published_base_with_nan_is_refused_before_it_is_trained_on(base, tmp_path):
    tensors = load_file(base)
    tensors[OUT].view(-1)[-1] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=f"{OUT} holds NaN or infinity"):
        merge.copy_published_base(tmp_path / "bad.safetensors", None, tmp_path / "out.safetensors")


# LoKr files

CONV, LINEAR = "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_input_blocks_4_1_proj_in"


def factored(alpha: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 12)}
    tensors = {f"{LINEAR}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {f"{LINEAR}.alpha": alpha}


def test_an_alpha_of_one_number_is_one_number_in_any_shape(base, tmp_path):
    results = []
    for index, alpha in enumerate((torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3.0]]), torch.tensor(3))):
        save_file(factored(alpha), tmp_path / f"{index}.safetensors")
        results.append(bake.bake(base, tmp_path / f"{index}.safetensors", ONE, 128, tmp_path / "out.safetensors", True))
        done = CliRunner().invoke(main, ["tensors", *(str(tmp_path / f"{each}.safetensors") for each in (0, index))])
        assert done.exit_code == 0 and done.output.startswith("same"), done.output
    assert len({result.written.sha256 for result in results}) == 1
    stored = factored(torch.tensor(3.0))
    w2 = stored[f"{LINEAR}.lokr_w2_a"] @ stored[f"{LINEAR}.lokr_w2_b"]
    delta = torch.kron(stored[f"{LINEAR}.lokr_w1"], w2) * 3 / 2
    key = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    expected = load_file(base)[key].float() + delta
    assert torch.allclose(load_file(tmp_path / "out.safetensors")[key].float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [torch.zeros(0), torch.ones(2), torch.ones(2, 2)])
def test_an_alpha_that_is_not_one_number_is_refused(base, tmp_path, alpha):
    save_file(factored(alpha), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=f"{LINEAR}.alpha has {alpha.numel()} numbers, and alpha is one number"):
        bake.bake(base, tmp_path / "bad.safetensors", ONE, 128, tmp_path / "out.safetensors", force=True)


def test_factors_that_would_fill_the_memory_or_have_rank_0_are_refused(base, tmp_path):
    huge = {"lokr_w1": (4, 4), "lokr_w2_a": (1 << 20, 1), "lokr_w2_b": (1, 1 << 20)}
    empty = {"lokr_w1_a": (4, 0), "lokr_w1_b": (0, 4), "lokr_w2": (12, 12), "alpha": ()}
    for shapes, said in ((huge, "another architecture"), (empty, "rank 0")):
        save_file({f"{LINEAR}.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=said):
            bake.bake(base, tmp_path / "x.safetensors", ONE, 128, tmp_path / "out.safetensors", force=True)


def adapters_of_lycoris():
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule

    layer = torch.nn.Linear(48, 48)
    kinds = {"LoHa": LohaModule, "LoRA": LoConModule, "OFT": DiagOFTModule, "GLoRA": GLoRAModule, "IA": IA3Module}
    for kind, module in kinds.items():
        yield kind, {f"{LINEAR}.{name}": value for name, value in module(LINEAR, layer, 1.0, 4, 4).state_dict().items()}
    peft = {f"unet.down_blocks.1.attentions.0.proj_in.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    yield "LoRA", peft


def test_other_kinds_of_files_are_named_with_the_tensor_that_tells_them(base, tmp_path):
    found = set()
    for kind, tensors in adapters_of_lycoris():
        save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=rf"is a \(?{kind}") as refusal:
            bake.bake(base, tmp_path / "other.safetensors", ONE, 128, tmp_path / "out.safetensors", force=True)
        telling = refusal.value.message.split("the tensor '")[1].split("'")[0]
        assert telling in tensors and not telling.endswith("alpha")
        found.add(kind)
    assert len(found) == 5


def test_bundled_embeddings_are_named_and_left_out_if_asked(base, lokr, tmp_path):
    bundled = {"bundle_emb.style.string_to_param.*": torch.zeros(2, 48), "bundle_emb.style.clip_g": torch.zeros(2, 64)}
    save_file(load_file(lokr) | bundled, tmp_path / "bundle.safetensors")
    with pytest.raises(UserError, match="bundles embeddings.*bundle_emb.style.*--drop-extra leaves them out"):
        bake.bake(base, tmp_path / "bundle.safetensors", ONE, 128, tmp_path / "out.safetensors", force=True)
    dropped = bake.bake(
        base, tmp_path / "bundle.safetensors", ONE, 128, tmp_path / "out.safetensors", force=True, drop_extra=True
    )
    assert sorted(dropped.embeddings) == sorted(bundled)
    assert bake.bake(base, lokr, ONE, 128, tmp_path / "plain.safetensors", force=True).written == dropped.written
