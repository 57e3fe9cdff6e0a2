"""Two epochs of a LoKr with decomposed weights (DoRA), which the release did not use: trained, resumed, baked."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tiny_training
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.sdxl import model_loading
from kohaku_delta.weights import lokr_preset

POSTS = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tiny_training.write(
        tmp_path_factory.mktemp("dora"),
        POSTS,
        {"lokr": {"forward": "delta", "dora": True}, "schedule": {"epochs": 2}},
        learning_rate_unet=0.01,
    )
    done = tiny_training.run(folder, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.ci
def test_every_post_is_visited_twice_under_another_counter(trained):
    schedule = tiny_training.parquet.read(trained / "build" / "schedule.parquet")
    visits = [
        (post, visit) for row in schedule.to_pylist() for post, visit in zip(row["posts"], row["visits"], strict=True)
    ]
    assert len(visits) == 2 * POSTS and {visit for _, visit in visits} == set(range(2 * POSTS))
    assert all(sum(visited == post for visited, _ in visits) == 2 for post in {post for post, _ in visits})
    assert tiny_training.journal(trained).num_rows == schedule["step"][-1].as_py() + 1


@pytest.mark.ci
def test_magnitudes_are_trained_and_start_as_the_norms_of_the_base(trained):
    recipe = load(trained / "params.yaml")
    models = model_loading.load(trained / "build" / "delta-base.safetensors", recipe.model)
    found = load_file(trained / "build" / "delta-lokr.safetensors")
    targets = [
        target
        for target in lokr_preset.lokr_targets(
            {part: models[part] for part in ("te1", "te2", "unet")}, recipe.lokr.preset
        )
        if target.algorithm == "lokr"
    ]
    assert {f"{target.lora}.dora_scale" for target in targets} == {
        name for name in found if name.endswith(".dora_scale")
    }
    moved = 0
    for target in targets:
        weight = models[target.part].get_submodule(target.path).weight
        norms = torch.linalg.vector_norm(weight.flatten(1), dim=1).numpy().reshape(-1)
        scale = found[f"{target.lora}.dora_scale"].reshape(-1).astype(np.float32)
        assert np.allclose(scale, norms, rtol=0.2, atol=0.2), target.lora
        moved += target.part == "unet" and not np.allclose(scale, norms, rtol=1e-3)
    assert moved > len(targets) / 4


@pytest.mark.slow
def test_a_resumed_training_gives_the_same_bytes_and_the_bake_computes_what_was_trained(trained, tmp_path):
    """The baked model, without an adapter, has the losses that LyCORIS's decomposed forward has on the base."""
    wanted = tiny_training.outs(trained)
    for state in sorted(trained.glob("work/*/step-*"))[1:]:
        shutil.rmtree(state)
    for name in tiny_training.OUTS:
        (trained / "build" / name).unlink()
    done = tiny_training.run(trained)
    assert done.returncode == 0, done.stderr
    assert tiny_training.outs(trained) == wanted
    baked = tmp_path / "baked.safetensors"
    files = [
        f"--base={trained}/build/delta-base.safetensors",
        f"--lokr={trained}/build/delta-lokr.safetensors",
        f"--out={baked}",
        f"--params={trained}/params.yaml",
    ]
    done = subprocess.run(
        [sys.executable, tiny_training.ROOT / "stages" / "bake.py", *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    recipe = load(trained / "params.yaml")
    base, whole = (
        model_loading.load(path, recipe.model) for path in (trained / "build" / "delta-base.safetensors", baked)
    )
    from kohaku_delta.training.lokr import LokrAdapter

    x, context = (
        torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16),
        torch.linspace(-1, 1, 227 * 112).reshape(1, 227, 112),
    )
    conditions = {"text_embeds": torch.linspace(-1, 1, 64)[None], "time_ids": torch.full((1, 6), 128.0)}

    def forward(model):
        with torch.no_grad():
            return model["unet"](x, torch.tensor([500]), context, added_cond_kwargs=conditions, return_dict=False)[0]

    untrained = forward(base)
    adapter = LokrAdapter(base, recipe.lokr, torch.float32)
    weights = {
        name: torch.from_numpy(value.astype(np.float32))
        for name, value in load_file(trained / "build" / "delta-lokr.safetensors").items()
    }
    for name, weight in adapter.tensors().items():
        weight.copy_(weights[name])
    wanted = forward(base)
    assert (forward(whole) - wanted).abs().max() < 0.05 * (untrained - wanted).abs().max()


def test_dora_from_factors_is_refused_with_the_remedy(tmp_path):
    text = (tiny_training.ROOT / "params.yaml").read_text().replace("dora: false", "dora: true")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match="set lokr.forward to delta"):
        params.load(tmp_path / "params.yaml")
