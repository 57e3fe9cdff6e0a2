import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sdxl
from kohaku_delta.errors import UserError
from kohaku_delta.sdxl import model_loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    tiny_sdxl.write(path, 1)
    return path


def test_loading_draws_no_random_number_and_asks_for_no_gradient(checkpoint):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = model_loading.load(checkpoint, tiny_sdxl.MODEL)
    assert torch.equal(torch.get_rng_state(), before)
    for model in models.values():
        assert not model.training and not any(
            parameter.requires_grad or parameter.is_meta for parameter in model.parameters()
        )
        assert not any(buffer.is_meta for buffer in model.buffers())


def test_parts_dtype_and_attention_are_as_asked(checkpoint):
    models = model_loading.load(
        checkpoint, tiny_sdxl.MODEL, parts=("te1", "unet"), dtype=torch.bfloat16, attention="eager"
    )
    assert list(models) == ["te1", "unet"] and models["unet"].dtype == torch.bfloat16
    assert models["te1"].config._attn_implementation == "eager"
    assert {type(processor).__name__ for processor in models["unet"].attn_processors.values()} == {"AttnProcessor"}


def test_eager_and_sdpa_attention_compute_the_same(checkpoint):
    ids = torch.full((1, 77), 999)
    ids[0, :5] = torch.arange(5)
    first, second = (model_loading.load(checkpoint, tiny_sdxl.MODEL, attention=kind) for kind in ("eager", "sdpa"))
    with torch.no_grad():
        for part in ("te1", "te2"):
            ours, theirs = (
                models[part](ids, output_hidden_states=True).hidden_states[-2] for models in (first, second)
            )
            assert torch.allclose(ours, theirs, atol=1e-5)
        inputs = (torch.ones(1, 4, 16, 16), torch.tensor([5]), torch.ones(1, 77, 112))
        added = {"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)}
        ours, theirs = (models["unet"](*inputs, added_cond_kwargs=added).sample for models in (first, second))
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_text_encoders_know_the_end_token(checkpoint):
    models = model_loading.load(checkpoint, tiny_sdxl.MODEL, parts=("te1", "te2"))
    assert [models[part].config.eos_token_id for part in ("te1", "te2")] == [999, 999]
    ids = torch.full((1, 77), 999)
    ids[0, :4] = torch.tensor([998, 3, 4, 5])
    with torch.no_grad():
        out = models["te2"](ids)
    assert torch.allclose(out.text_embeds[0], models["te2"].text_projection(out.last_hidden_state[0, 4]), atol=1e-6)


def test_vae_reads_attention_stored_as_convolution_or_as_matrix(checkpoint, tmp_path):
    tensors = load_file(checkpoint)
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    assert tensors[name].ndim == 4
    tensors[name] = tensors[name][:, :, 0, 0]
    save_file(tensors, tmp_path / "flat.safetensors")
    ours, theirs = (
        model_loading.load(path, tiny_sdxl.MODEL)["vae"].state_dict()
        for path in (tmp_path / "flat.safetensors", checkpoint)
    )
    assert all(torch.equal(value, theirs[path]) for path, value in ours.items())


def test_missing_extra_and_other_shaped_tensors_are_listed(checkpoint, tmp_path):
    tensors = load_file(checkpoint)
    del tensors["conditioner.embedders.1.model.ln_final.weight"]
    tensors["model_ema.decay"] = torch.zeros(1)
    tensors["model.diffusion_model.time_embed.0.weight"] = torch.zeros(96, 25).half()
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as refusal:
        model_loading.load(tmp_path / "bad.safetensors", tiny_sdxl.MODEL)
    said = refusal.value.message
    assert (
        "bad.safetensors" in said
        and "missing: conditioner.embedders.1.model.ln_final.weight" in said
        and "not known: model_ema.decay" in said
    )
    assert (
        "other shape: model.diffusion_model.time_embed.0.weight is [96, 25], "
        "and time_embedding.linear_1.weight takes [96, 24]" in said
    )


def test_norm_groups_that_do_not_fit_are_a_sentence(checkpoint):
    with pytest.raises(UserError, match="model.norm_groups"):
        model_loading.load(checkpoint, tiny_sdxl.MODEL.model_copy(update={"norm_groups": 7}))


def test_a_lora_is_not_a_checkpoint(tmp_path):
    save_file({"lora_unet_out_2.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="lora.safetensors: this is not an SDXL checkpoint"):
        model_loading.load(tmp_path / "lora.safetensors", tiny_sdxl.MODEL)
