"""A new LoKr changes nothing; its weights depend on seed and name; text encoder 1's last layer never changes."""

import pytest
import torch

import tiny_sdxl
from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.sdxl import model_loading
from kohaku_delta.training.lokr import LokrAdapter, init_weight
from kohaku_delta.weights import lokr_preset

LOKR = load("miniature/params.yaml").lokr
LAST = "lora_te1_text_model_encoder_layers_2_"


@pytest.fixture
def models(tmp_path):
    numerics.enforce()
    tiny_sdxl.write(tmp_path / "toy.safetensors", 1)
    return {
        name: module.requires_grad_(False)
        for name, module in model_loading.load(tmp_path / "toy.safetensors", tiny_sdxl.MODEL).items()
    }


def forward(models):
    ids = torch.arange(77)[None]
    time, context = torch.tensor([500]), torch.linspace(-1, 1, 227 * 112).reshape(1, 227, 112)
    conditions = {"text_embeds": torch.linspace(-1, 1, 64)[None], "time_ids": torch.full((1, 6), 128.0)}
    picture = models["unet"](
        torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16),
        time,
        context,
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]
    return torch.cat(
        [output.flatten() for output in (picture, models["te1"](ids).last_hidden_state, models["te2"](ids).text_embeds)]
    )


def test_a_fresh_adapter_changes_nothing(models):
    before = forward(models)
    adapter = LokrAdapter(models, LOKR, torch.float32)
    assert torch.equal(forward(models), before)
    assert all((entry.lokr_w2 == 0).all() for entry in adapter.entries.values() if hasattr(entry, "lokr_w2"))
    next(entry for entry in adapter.entries.values() if hasattr(entry, "lokr_w2")).lokr_w2.data.fill_(0.1)
    assert not torch.equal(forward(models), before)


def test_the_start_depends_on_seed_and_name_only_and_fills_the_kaiming_bound():
    drawn = init_weight((400, 16), 1337, "lora_unet_out_2")
    assert torch.equal(drawn, init_weight((400, 16), 1337, "lora_unet_out_2"))
    assert not torch.equal(drawn, init_weight((400, 16), 1337, "lora_unet_out_0")) and not torch.equal(
        drawn, init_weight((400, 16), 1, "lora_unet_out_2")
    )
    assert drawn.abs().max() <= 0.25 and drawn.abs().max() > 0.249 and abs(drawn.mean()) < 0.01


def test_every_trained_weight_gets_a_gradient_and_text_encoder_1s_last_layer_gets_none(models):
    adapter = LokrAdapter(models, LOKR, torch.float32)
    from kohaku_delta.training import conditioning

    ids = torch.full((1, 3, 77), 999)
    ids[:, :, 0] = 998
    ids[:, :, 1:9] = torch.arange(1, 9)
    context, pooled = conditioning.encode(models["te1"], models["te2"], ids, ids, 999)
    conditions = {"text_embeds": pooled, "time_ids": torch.full((1, 6), 128.0)}
    models["unet"](
        torch.ones(1, 4, 16, 16), torch.tensor([5]), context, added_cond_kwargs=conditions, return_dict=False
    )[0].square().sum().backward()
    for name, entry in adapter.entries.items():
        for weight in entry.parameters():
            assert (weight.grad is None) == name.startswith(LAST), name
    trained = {name for name, _ in adapter.trained()}
    assert trained == {name for name in adapter.tensors() if not name.startswith(LAST)}


def test_rates_and_weight_decay_reach_exactly_the_trained_weights_norms_included(models):
    """With a zero gradient only weight decay is left: × (1 − 0.1 · rate) per group, and nothing in text encoder 1's
    last layer.
    """
    from kohaku_delta.training import optimizer

    parameters = load("params.yaml").train.model_copy(
        update={"warmup_steps": 0, "learning_rate_unet": 0.5, "learning_rate_text": 0.25}
    )
    adapter = LokrAdapter(models, LOKR, torch.float32)
    for weight in adapter.tensors().values():
        weight.add_(1.0)
    before = {name: weight.clone() for name, weight in adapter.tensors().items()}
    trained = adapter.trained()
    optimizer.Lion(trained, parameters).step(
        0, torch.zeros(sum(weight.numel() for _, weight in trained)), optimizer.LossScaler(False)
    )
    for name, weight in adapter.tensors().items():
        factor = 1.0 if name.startswith(LAST) else 0.95 if name.startswith("lora_unet_") else 0.975
        assert torch.allclose(weight, before[name] * factor, rtol=1e-6, atol=0), name
        assert torch.equal(weight, before[name]) == name.startswith(LAST), name
    norms = {name for name, entry in adapter.entries.items() if not hasattr(entry, "lokr_w2")}
    assert (
        norms
        and all(name.startswith("lora_unet_") for name in norms)
        and norms <= {name.rpartition(".")[0] for name, _ in trained}
    )


@pytest.mark.parametrize(
    "preset", [{"modules": {"CrossAttention": 4, "SpatialTransformer": 8}}, {"names": {"time_embeddings": 8}}]
)
def test_a_target_that_matches_nothing_is_refused_by_name(models, preset):
    wrong = LOKR.model_copy(update={"preset": LOKR.preset.model_copy(update=preset)})
    with pytest.raises(UserError, match="SpatialTransformer|time_embeddings"):
        LokrAdapter(models, wrong, torch.float32)


def test_a_dim_with_which_lycoris_trains_small_matrices_is_refused_and_the_next_one_is_not(models):
    from lycoris.modules.lokr import LokrModule

    targets = [target for target in lokr_preset.lokr_targets(models, LOKR.preset) if target.algorithm == "lokr"]
    layers = [(models[target.part].get_submodule(target.path), target.factor) for target in targets]

    def all_full(dim: int) -> bool:
        made = [LokrModule("x", layer, lora_dim=dim, alpha=dim, factor=factor) for layer, factor in layers]
        return all(hasattr(module, "lokr_w2") for module in made)

    least = next(dim for dim in range(1, 500) if all_full(dim))
    LokrAdapter(models, LOKR.model_copy(update={"dim": least}), torch.float32)
    with pytest.raises(UserError, match=rf"lokr.dim is {least - 1}, .* Set lokr.dim to {least} or more"):
        LokrAdapter(models, LOKR.model_copy(update={"dim": least - 1}), torch.float32)
