"""A miniature of recipes/epsilon-rev1: its captions, rates and conditioning, over several epochs, with other lanes and
another preset than the miniature of Delta.
"""

import math
from collections import Counter

import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file

import tiny_training
from kohaku_delta import params
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import post_metadata
from kohaku_delta.formats import parquet
from kohaku_delta.sdxl import model_loading
from kohaku_delta.weights.lokr_preset import lokr_targets

EPSILON = YAML(typ="safe", pure=True).load((tiny_training.ROOT / "recipes/epsilon-rev1/params.yaml").read_text())
POSTS, EPOCHS = 11, 3
KEPT = (
    "weight_decay",
    "betas",
    "tag_dropout",
    "noise_offset",
    "min_snr_gamma",
    "timestep_freq_shift",
    "text_projection",
)
PRESET = {"modules": {"CrossAttention": 2, "CLIPMLP": 4}, "names": {"time_embed": 4}, "norms": False}


def write(folder):
    """Epsilon's captions (thresholds from the database) and training, warm-up over four steps instead of 250."""
    sections = {
        "caption": EPSILON["caption"] | {"quality_above": {"percentiles": [90, 75, 60, 45, 30, 10]}},
        "schedule": {"epochs": EPOCHS, "micro_batches": 4, "lanes": 2},
        "lokr": {"preset": PRESET},
    }
    train = {name: EPSILON["train"][name] for name in (*KEPT, "learning_rate_unet", "learning_rate_text")}
    return tiny_training.write(folder, POSTS, sections, warmup_steps=4, **train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("epsilon"))
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_it_visits_every_post_once_per_epoch_at_its_own_rates(trained):
    order = parquet.read(trained / "build" / "schedule.parquet")
    posts = [post for row in order["posts"].to_pylist() for post in row]
    assert set(Counter(posts).values()) == {EPOCHS} and len(set(posts)) == POSTS
    assert set(order["lane"].to_pylist()) == {0, 1}
    journal = tiny_training.journal(trained)
    steps = order["step"][-1].as_py() + 1
    assert journal.num_rows == steps == EPOCHS * math.ceil(order.num_rows / EPOCHS / 4) > 4
    unet, text = (journal[f"learning_rate_{part}"].to_numpy() for part in ("unet", "text"))
    warmup = np.minimum(np.arange(steps) / 4, 1)
    assert np.allclose(unet, 2e-5 * warmup, rtol=1e-6) and np.allclose(text, 5e-6 * warmup, rtol=1e-6)
    assert all(math.isfinite(loss) for losses in journal["losses"].to_pylist() for loss in losses)


@pytest.mark.slow
def test_the_file_has_the_modules_and_factors_of_its_preset_and_they_were_trained(trained):
    recipe = params.load(trained / "params.yaml")
    models = model_loading.load(trained / "build" / "delta-base.safetensors", recipe.model)
    targets = lokr_targets({part: models[part] for part in ("te1", "te2", "unet")}, recipe.lokr.preset)
    found = load_file(trained / "build" / "delta-lokr.safetensors")
    names = {name.rpartition(".")[0] for name in found}
    moved = {name.rpartition(".")[0] for name, tensor in found.items() if name.endswith("lokr_w2") and tensor.any()}
    assert names == {target.lora for target in targets} and {target.factor for target in targets} == {2, 4}
    assert {name.split("_")[1] for name in moved} == {"unet", "te1", "te2"}


@pytest.mark.slow
def test_its_quality_tags_are_the_databases_percentiles(trained):
    recipe = params.load(trained / "params.yaml")
    database = Database(tiny_training.ROOT / "data" / "danbooru2023.db")
    table = parquet.read(trained / "build" / "captions.parquet")
    metadata = post_metadata.post_metadata(database, table["post_id"].to_numpy(), recipe.caption)
    for general, quality in zip(table["general"].to_pylist(), metadata.quality.tolist(), strict=True):
        words = [word for word in general if word in recipe.caption.quality]
        assert words == ([recipe.caption.quality[quality]] if quality >= 0 else [])
    assert metadata.thresholds != EPSILON["caption"]["quality_above"] and len(metadata.thresholds) == 4


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes(trained, tmp_path):
    folder = write(tmp_path / "two")
    done = tiny_training.run(folder, ranks=2)
    assert done.returncode == 0, done.stderr
    assert tiny_training.outs(folder) == tiny_training.outs(trained)
