"""A training that begins with the LoKr of another one, as kohya's --network_weights does: from its values exactly, with
a new optimizer, the same bytes every time; and it refuses, before its first step, what is no LoKr of this recipe.
"""

import hashlib
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import tiny_training
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.preflight import parameter_counts
from kohaku_delta.verify import replay_training
from kohaku_delta.weights import lokr_format

POSTS = 8
LOKR, BASE = "build/delta-lokr.safetensors", "build/delta-base.safetensors"


def again(folder, first):
    """A second training: other seeds, and step 0 at rate 0, so that the LoKr after it is the one that it began with."""
    start = first / LOKR
    return tiny_training.write(
        folder, POSTS, {"schedule": {"seed": 7}}, start, seed=7, warmup_steps=1, milestone_every=1
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tiny_training.write(tmp_path_factory.mktemp("first"), POSTS, milestone_every=2)
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained_on(first, tmp_path_factory):
    folder = again(tmp_path_factory.mktemp("trained-on"), first)
    done = tiny_training.run(folder)
    assert done.returncode == 0 and "the LoKr starts from" in done.stderr, done.stderr
    return folder


@pytest.mark.ci
def test_it_begins_with_the_files_weights_and_trains_on_from_them(first, trained_on):
    start = load_file(first / LOKR)
    after = [load_file(path) for path in sorted((trained_on / "build" / "milestones").iterdir())]
    assert len(after) > 1 and all(weights.keys() == start.keys() for weights in after)
    assert all(np.array_equal(after[0][name], start[name]) for name in start)  # 0 may have become -0, by a rate of 0
    moved = {name for name in start if not np.array_equal(after[-1][name], start[name])}
    unmoved = {name for name in start if name.endswith(".alpha") or "te1_text_model_encoder_layers_2_" in name}
    assert moved == start.keys() - unmoved


@pytest.mark.ci
def test_journal_and_lokr_name_the_start_by_its_sha256_and_a_new_lokr_names_none(first, trained_on):
    sha256 = hashlib.sha256((first / LOKR).read_bytes()).hexdigest()
    for folder, expected in ((first, None), (trained_on, sha256)):
        header = json.loads(pq.read_schema(folder / "build" / "journal.parquet").metadata[b"kohaku_delta"])
        assert header.get("network_weights") == expected
        with safe_open(folder / LOKR, "np") as file:
            assert file.metadata().get("ss_network_weights") == expected
        depends = json.loads(next(folder.glob("work/*/depends.json")).read_text())["depends"]
        assert depends.get("network_weights") == expected


@pytest.mark.ci
def test_a_replay_from_step_0_begins_with_it_too(trained_on, tmp_path):
    tables = {name: trained_on / "build" / f"{name}.parquet" for name in ("posts", "captions", "schedule", "journal")}
    files = tables | {"inputs": trained_on / "build" / "inputs.json", "base": trained_on / BASE}
    files |= dict.fromkeys(("tars", "tokenizer", "tokenizer_2"))
    recipe = params.load(trained_on / "params.yaml")
    assert list(replay_training.replay_steps(recipe, files, tmp_path, 0, 1)) == [(0, None), (1, None)]


@pytest.mark.parametrize("ours, theirs", [(None, "a" * 64), ("a" * 64, None), ("a" * 64, "b" * 64)])
def test_a_replay_of_a_journal_that_began_with_another_lokr_is_refused(ours, theirs):
    headers = [{"base": "c", "parameters": {}} | ({"network_weights": each} if each else {}) for each in (theirs, ours)]
    with pytest.raises(UserError, match="journal.parquet began with (the LoKr of sha256 |a new LoKr)"):
        replay_training.require_same_run(*headers, {"journal": "journal.parquet", "base": "base"})
    replay_training.require_same_run(headers[0], headers[0], {})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_it_gives_the_same_bytes(first, trained_on, tmp_path, ranks):
    other = again(tmp_path / "other", first)
    process = subprocess.Popen(
        tiny_training.command(ranks), cwd=other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(other.glob("work/*/step-00000001")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = tiny_training.run(other, ranks)
    assert done.returncode == 0, done.stderr
    assert tiny_training.outs(other) == tiny_training.outs(trained_on)


@pytest.mark.ci
def test_another_start_is_another_run_and_another_base_is_refused_before_the_first_step(first, tmp_path):
    milestone = first / "build" / "milestones" / "delta-lokr-step00000002.safetensors"
    folder = tiny_training.write(tmp_path / "other", POSTS, start=milestone)
    tiny_training.tiny_sdxl.write(folder / BASE, 2)
    done = tiny_training.run(folder)
    assert done.returncode == 1 and "was trained on another base than build/delta-base" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(folder.glob("work/*/step-*"))


# what was done to the file → what is said
ALPHA, W1, W2 = (f"lora_unet_out_2.{suffix}" for suffix in ("alpha", "lokr_w1", "lokr_w2"))
REFUSED = {
    "missing": (lambda t: t.pop(W2), f"missing: {W2}"),
    "a module missing": (lambda t: [t.pop(name) for name in (W1, W2, ALPHA)], f"missing: {W1}"),
    "a module too many": (
        lambda t: t.update({name.replace("out_2", "out_9"): t[name] for name in (W1, W2, ALPHA)}),
        "not trained by this recipe: lora_unet_out_9.lokr_w1",
    ),
    "another factor": (
        lambda t: t.update({W1: np.zeros((2, 4), np.float16), W2: np.zeros((2, 6, 3, 3), np.float16)}),
        f"other shape: {W1} is [2, 4], and ",
    ),
    "low rank": (
        lambda t: t.update({f"{W2}_a": t[W2][:, :1, 0, 0], f"{W2}_b": t.pop(W2)[:1, :, 0, 0]}),
        f"not trained by this recipe: {W2}_a",
    ),
    "another alpha": (
        lambda t: t.update({ALPHA: np.float16(1)[None]}),
        f"other alpha: {ALPHA} is 1, and lokr.alpha is",
    ),
    "alphas": (lambda t: t.update({ALPHA: np.ones(3, np.float16)}), f"other alpha: {ALPHA} is nan"),
    "NaN": (lambda t: t[W2].__setitem__(0, np.nan), f"{W2} holds NaN, infinity"),
    "too large": (lambda t: t.update({W2: t[W2].astype(np.float32) + 1e6}), "too large for float16"),
    "whole numbers": (lambda t: t.update({W2: t[W2].astype(np.int32)}), f"{W2} is I32"),
    "a LoRA": (lambda t: t.update({"lora_unet_out_2.lora_up.weight": t[W1]}), "is a LoRA"),
    "a textual inversion in it": (
        lambda t: t.update({"bundle_emb.me.string_to_param.*": t[W1]}),
        "not trained by this recipe: bundle_emb.me",
    ),
}


def read(path, first):
    start = load_file(first / LOKR)
    shapes = {name: array.shape for name, array in start.items() if not name.endswith(".alpha")}
    with safetensors_io.open_file(path) as file:
        return dict(lokr_format.read_weights(file, shapes, 10000))


@pytest.mark.ci
@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_lokr_of_this_recipe_is_refused_by_name(first, tmp_path, case):
    tensors = {name: array.copy() for name, array in load_file(first / LOKR).items()}
    change, sentence = REFUSED[case]
    change(tensors)
    safetensors_io.save(tmp_path / "changed.safetensors", tensors)
    with pytest.raises(UserError) as error:
        read(tmp_path / "changed.safetensors", first)
    assert sentence in error.value.message, error.value.message


@pytest.mark.ci
def test_files_of_other_precision_and_without_alphas_are_read(first, tmp_path):
    start = load_file(first / LOKR)
    wide = {name: array.astype(np.float32) for name, array in start.items() if not name.endswith(".alpha")}
    safetensors_io.save(tmp_path / "wide.safetensors", wide)
    found = read(tmp_path / "wide.safetensors", first)
    assert found.keys() == wide.keys() and all(np.array_equal(found[name], wide[name]) for name in wide)


@pytest.mark.ci
def test_preflight_says_before_everything_what_the_training_would_refuse(first):
    recipe = params.load(first / "params.yaml")

    def pin(path):
        return params.Pin(url=f"file://{path}", bytes=None, sha256=None)

    def told(path, **changed):
        inputs = {"sdxl": pin(first / BASE)} | ({"network_weights": pin(path)} if path else {})
        download = recipe.download.model_copy(update={"inputs": inputs})
        lokr = recipe.lokr.model_copy(update=changed)
        return parameter_counts.network_weights_error(
            recipe.model_copy(update={"download": download, "lokr": lokr}), first
        )

    assert told(first / LOKR) == ""
    assert "alpha is 10000, and lokr.alpha is 1" in told(first / LOKR, alpha=1)
    without_norms = recipe.lokr.preset.model_copy(update={"norms": False})
    assert "not trained by this recipe: " in told(first / LOKR, preset=without_norms)
    assert told(first / "not there yet.safetensors") is None and told(None) is None


def test_a_list_of_lokrs_to_begin_with_is_refused(tmp_path):
    content = tiny_training.yaml.load(Path("miniature/params.yaml").read_text())
    content["download"]["inputs"]["network_weights"] = [{"url": "file://x", "bytes": None, "sha256": None}]
    with open(tmp_path / "params.yaml", "w") as file:
        tiny_training.yaml.dump(content, file)
    with pytest.raises(UserError, match="inputs.network_weights is a list; it must be one file"):
        params.load(tmp_path / "params.yaml")
