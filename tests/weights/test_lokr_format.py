import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.sdxl import model_loading
from kohaku_delta.weights import lokr_format

RECIPE = params.load(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    tiny_sdxl.write(tmp_path_factory.getbasetemp() / "lokr-base.safetensors", 5)
    return model_loading.load(tmp_path_factory.getbasetemp() / "lokr-base.safetensors", tiny_sdxl.MODEL)


@pytest.fixture(scope="module")
def trained(models):
    adapters = tiny_sdxl.lokr(models, RECIPE.lokr.preset)
    weights = {
        f"{name}.{suffix}": weight.detach().numpy()
        for name, adapter in adapters.items()
        for suffix, weight in adapter.named_parameters()
    }
    return adapters, weights


def test_file_holds_what_lycoris_saves_under_kohyas_names_as_fp16(trained, tmp_path):
    adapters, weights = trained
    lokr_format.write_lokr(tmp_path / "lokr.safetensors", weights, RECIPE, "ab" * 32)
    ours = load_file(tmp_path / "lokr.safetensors")
    theirs = {
        f"{name}.{suffix}": value
        for name, adapter in adapters.items()
        for suffix, value in adapter.state_dict().items()
    }
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float16 and torch.equal(value, theirs[name].half()), name
        assert re.fullmatch(
            r"lora_(unet|te1_text_model|te2_text_model)_[a-z0-9_]+\.(alpha|lokr_w1|lokr_w2|w_norm|b_norm)", name
        )
    assert ours["lora_unet_out_2.alpha"] == 10000


def test_lycoris_reads_the_file_back_as_the_same_differences(models, trained, tmp_path):
    from lycoris.modules import get_module, make_module

    adapters, weights = trained
    lokr_format.write_lokr(tmp_path / "lokr.safetensors", weights, RECIPE, "ab" * 32)
    stored = {name: value.float() for name, value in load_file(tmp_path / "lokr.safetensors").items()}
    for name, adapter in list(adapters.items())[::7]:
        kind, parts = get_module(stored, name)
        with torch.no_grad():
            back = make_module(kind, parts, name, adapter.org_module[0])
            for ours, theirs in zip(back.get_diff_weight(), adapter.get_diff_weight(), strict=True):
                assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name


def test_header_says_what_webuis_show_and_nothing_that_varies(trained, tmp_path):
    _, weights = trained
    written = lokr_format.write_lokr(tmp_path / "a.safetensors", weights, RECIPE, "ab" * 32, {"ss_steps": "7"})
    again = lokr_format.write_lokr(
        tmp_path / "b.safetensors", dict(reversed(weights.items())), RECIPE, "ab" * 32, {"ss_steps": "7"}
    )
    assert written == again and (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        said = file.metadata()
    content = (tmp_path / "a.safetensors").read_bytes()
    assert said["sshs_model_hash"] == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert said[lokr_format.BASE_DIGEST] == "ab" * 32 and said["ss_steps"] == "7"
    assert said["ss_network_module"] == "lycoris.kohya" and json.loads(said["ss_network_args"])["algo"] == "lokr"
    assert (
        said["ss_base_model_version"] == "sdxl_base_v1-0"
        and said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    )
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_total_batch_size"]) == ("10000", "10000", "128")
    assert not {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date"} & set(said)


def test_how_many_gpus_trained_it_is_not_in_the_file():
    other = RECIPE.model_copy(
        update={"train": RECIPE.train.model_copy(update={"ranks": 1, "work": "elsewhere", "save_every": 1})}
    )
    assert lokr_format.metadata(other, "x") == lokr_format.metadata(RECIPE, "x")


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_what_fp16_cannot_hold_is_refused_by_name(trained, tmp_path, value):
    _, weights = trained
    name = "lora_unet_out_2.lokr_w2"
    bad = np.full_like(weights[name], value)
    with pytest.raises(UserError, match=name):
        lokr_format.write_lokr(tmp_path / "x.safetensors", weights | {name: bad}, RECIPE, "x")
    assert not list(tmp_path.iterdir())


def test_an_alpha_that_fp16_would_make_infinite_is_refused_in_params():
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        type(RECIPE.lokr)(**(RECIPE.lokr.model_dump() | {"alpha": 65520}))


def test_entries_are_read_by_kind(trained, tmp_path):
    _, weights = trained
    lokr_format.write_lokr(tmp_path / "x.safetensors", weights, RECIPE, "base")
    with safetensors_io.open_file(tmp_path / "x.safetensors") as file:
        entries = lokr_format.group_by_module(file)
        assert lokr_format.base_digest(file) == "base"
    assert entries["lora_unet_out_0"] == (
        "norm",
        {"b_norm": "lora_unet_out_0.b_norm", "w_norm": "lora_unet_out_0.w_norm"},
    )
    assert entries["lora_unet_out_2"][0] == "lokr" and set(entries["lora_unet_out_2"][1]) == {
        "alpha",
        "lokr_w1",
        "lokr_w2",
    }
