"""Time step and pooled output in both forms: the release's trainer's (sd-scripts v0.8.3) and SDXL's own, from the
published formulas.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps

import tiny_sdxl
import tiny_training
from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.preview import held_out_loss
from kohaku_delta.sdxl import model_loading
from kohaku_delta.training import training_context
from kohaku_delta.training.sdxl_model import SDXL, ConditioningForm, Sdxl

RELEASE = ConditioningForm(timestep_freq_shift=1, text_projection="transposed")
STEPS = [0, 1, 100, 500, 999]


def sinusoid(step: int, width: int, divisor: int) -> np.ndarray:
    """cos, then sin, of t · 10000^(−i / divisor), float64."""
    angles = step * 10000.0 ** (-np.arange(width // 2) / divisor)
    return np.concatenate([np.cos(angles), np.sin(angles)])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    numerics.enforce()
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    tiny_sdxl.write(path, 1)
    return path


@pytest.fixture
def model(path):
    return Sdxl(model_loading.load(path, tiny_sdxl.MODEL, dtype=torch.float32), 999, 0.13025, 5.0, "cpu", torch.float32)


@pytest.mark.parametrize(
    "width, form, divisor", [(320, RELEASE, 159), (320, SDXL, 160), (24, RELEASE, 11), (24, SDXL, 12)]
)
def test_the_time_step_is_the_sinusoid_of_its_form(model, width, form, divisor):
    if width == 320:  # SDXL's own width, made as its U-Net makes it
        model.models["unet"].time_proj = Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)
    model.set_form(form)
    vectors = model.models["unet"].time_proj(torch.tensor(STEPS)).double().numpy()
    for step, vector in zip(STEPS, vectors, strict=True):
        assert np.allclose(vector, sinusoid(step, width, divisor), atol=1e-4), step


def test_both_forms_of_the_time_step_are_as_far_apart_as_the_facts_say():
    """10 % at t = 100, 50 % at t = 500, 88 % at t = 999, measured with sd-scripts' own code."""
    distances = [
        np.linalg.norm(sinusoid(step, 320, 159) - sinusoid(step, 320, 160)) / np.linalg.norm(sinusoid(step, 320, 160))
        for step in (100, 500, 999)
    ]
    assert distances == pytest.approx([0.10, 0.50, 0.88], abs=0.02)


@pytest.mark.parametrize("form", [RELEASE, SDXL])
def test_the_pooled_output_is_projected_in_its_form(model, form):
    """x · P as open_clip computes it; x · Pᵀ if the checkpoint's P is used as the weight of a linear layer (outputs,
    inputs).
    """
    matrix = tiny_sdxl.tensors(1)["conditioner.embedders.1.model.text_projection"].double()
    assert not torch.allclose(matrix, matrix.T), "with a symmetric P both forms are equal"
    ids = torch.full((2, 3, 77), 999)
    ids[:, :, 0] = 998
    ids[:, 0, 1:9] = torch.arange(1, 17).reshape(2, 8)
    model.set_form(form)
    context, pooled = model.conditions(ids, ids)
    state = model.models["te2"](ids[:, 0]).last_hidden_state[:, 9].double()
    expected = state @ (matrix.T if form is RELEASE else matrix)
    assert torch.allclose(pooled.double(), expected, atol=1e-5) and not torch.allclose(
        pooled.double(), state @ (matrix if form is RELEASE else matrix.T), atol=1e-2
    )
    model.set_form(SDXL)
    assert torch.equal(model.conditions(ids, ids)[0], context), "the states of the tokens have one form"


def test_a_projection_that_is_not_square_cannot_be_transposed(model):
    model.models["te2"].text_projection = torch.nn.Linear(64, 48, bias=False)
    with pytest.raises(UserError, match="maps 64 numbers to 48.*Set it to sdxl"):
        model.set_form(RELEASE)


def test_a_model_computes_in_the_form_that_its_recipe_trains_in_unless_another_is_passed(path):
    recipe = load("params.yaml")
    recipe = recipe.model_copy(
        update={"model": tiny_sdxl.MODEL, "train": recipe.train.model_copy(update={"precision": "float32"})}
    )
    tokens = type("Tokens", (), {"eos_token_id": 999, "__len__": lambda self: 1000})()
    model = training_context.load_sdxl(recipe, path, (tokens, tokens), "cpu", torch.float32)
    assert model.form == RELEASE and model.models["unet"].time_proj.downscale_freq_shift == 1
    model = training_context.load_sdxl(recipe, path, (tokens, tokens), "cpu", torch.float32, SDXL)
    assert model.form == SDXL and model.models["unet"].time_proj.downscale_freq_shift == 0


def test_the_held_out_loss_is_measured_in_both_forms_and_leaves_sdxls(model, monkeypatch):
    measured = []

    def loss(model, *data):
        measured.append(model.form)
        return float(len(measured))

    monkeypatch.setattr(held_out_loss, "mean_loss", loss)
    assert (
        held_out_loss.losses_by_form(model, RELEASE) == {"sdxl": 1.0, "training": 2.0}
        and measured == [SDXL, RELEASE]
        and model.form == SDXL
    )
    assert held_out_loss.losses_by_form(model, SDXL) == {"sdxl": 3.0, "training": 3.0}


@pytest.mark.slow
def test_every_value_of_both_keys_trains_and_replays_in_its_own_form(tmp_path):
    """Four trainings of one step have four journals, and each is replayed in its form, which comes from the recipe."""
    losses = {}
    for shift in (0, 1):
        for projection in ("sdxl", "transposed"):
            folder = tiny_training.write(
                tmp_path / f"{shift}-{projection}", 4, timestep_freq_shift=shift, text_projection=projection
            )
            assert tiny_training.run(folder).returncode == 0
            losses[shift, projection] = tiny_training.journal(folder).to_pylist()[0]["losses"]
            again = subprocess.run(
                [sys.executable, "-m", "kohaku_delta", "replay", "--from", "0", "--to", "0"],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert again.returncode == 0 and "equal" in again.stdout, again.stdout + again.stderr
    assert len({tuple(each) for each in losses.values()}) == 4
