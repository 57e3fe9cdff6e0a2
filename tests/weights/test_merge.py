import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.weights import merge

RECIPE = params.load(Path(__file__).parents[2] / "params.yaml").merge
IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    paths = {name: folder / f"{name}.safetensors" for name in ("sdxl", "gamma", "beta")}
    for seed, path in enumerate(paths.values()):
        tiny_sdxl.write(path, seed)
    return paths


def merged(files, out, recipe=RECIPE, **options):
    return merge.merge(files["sdxl"], {"gamma": files["gamma"], "beta": files["beta"]}, recipe, out, **options).written


def changed(path, out, change):
    tensors = load_file(path)
    change(tensors)
    safetensors_io.save(out, {name: value.numpy() for name, value in tensors.items()})
    return out


def test_sum_is_torchs_with_the_donors_embeddings_in_both_parents(files, tmp_path):
    merged(files, tmp_path / "base.safetensors")
    sdxl, gamma, beta = (load_file(files[name]) for name in ("sdxl", "gamma", "beta"))
    ours = load_file(tmp_path / "base.safetensors")
    assert ours.keys() == sdxl.keys()
    for name, value in ours.items():
        if name in (*RECIPE.donor_embeddings, IDS, "conditioner.embedders.1.model.logit_scale"):
            assert torch.equal(value, sdxl[name])
        else:
            assert torch.equal(value, (gamma[name].float() * 0.5 + beta[name].float() * 0.5).half()), name


def test_same_bytes_for_any_piece_size_and_number_of_threads(files, tmp_path):
    found = {
        merged(files, tmp_path / "x.safetensors", numbers=numbers, threads=threads).sha256
        for numbers in (1000, 4096, 1 << 20)
        for threads in (1, 3)
    }
    assert found == {hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()}


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.0, 0.25)])
@pytest.mark.parametrize("compute", ["float32", "float16"])
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16"])
def test_compute_and_output_dtypes_round_as_torch_does(files, tmp_path, weights, compute, output):
    recipe = RECIPE.model_copy(
        update={
            "weights": dict(zip(("gamma", "beta"), weights, strict=True)),
            "compute_dtype": compute,
            "output_dtype": output,
            "donor_embeddings": [],
        }
    )
    merged(files, tmp_path / "base.safetensors", recipe)
    gamma, beta = load_file(files["gamma"]), load_file(files["beta"])
    dtype = getattr(torch, compute)
    with safe_open(tmp_path / "base.safetensors", "pt") as file:
        for name in (
            "model.diffusion_model.input_blocks.0.0.weight",
            "first_stage_model.quant_conv.bias",
            "conditioner.embedders.1.model.text_projection",
        ):
            a, b = (
                value[name].to(dtype) * torch.tensor(weight, dtype=dtype)
                for value, weight in ((gamma, weights[0]), (beta, weights[1]))
            )
            assert torch.equal(file.get_tensor(name), (a + b).to(getattr(torch, output)))


def test_parents_may_lack_what_is_no_parameter(files, tmp_path):
    bare = changed(files["gamma"], tmp_path / "bare.safetensors", lambda tensors: tensors.pop(IDS))
    whole, without = (
        merged(files, tmp_path / "a.safetensors"),
        merged(files | {"gamma": bare}, tmp_path / "b.safetensors"),
    )
    assert whole == without


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "missing: model.diffusion_model.out.2.bias"),
        (lambda t: t.update(extra=torch.zeros(2)), "not part of SDXL: extra"),
        (
            lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5).half()}),
            r"model.diffusion_model.out.2.bias is F16 \[5\]",
        ),
        (
            lambda t: t["first_stage_model.quant_conv.bias"].fill_(float("nan")),
            "first_stage_model.quant_conv.bias: the sum holds NaN",
        ),
        (lambda t: t["first_stage_model.quant_conv.bias"].fill_(float("inf")), "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("which", ["gamma", "beta"])
def test_a_parent_that_does_not_fit_is_named_and_nothing_is_left(files, tmp_path, change, said, which):
    (tmp_path / "in").mkdir()
    bad = changed(files[which], tmp_path / "in" / "bad.safetensors", change)
    with pytest.raises(UserError, match=said):
        merged(files | {which: bad}, tmp_path / "base.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_donor_without_a_tensor_is_refused_even_if_all_lack_it(files, tmp_path):
    for path in files.values():
        changed(path, tmp_path / path.name, lambda tensors: tensors.pop("conditioner.embedders.1.model.ln_final.bias"))
    with pytest.raises(UserError, match="missing: conditioner.embedders.1.model.ln_final.bias"):
        merged({name: tmp_path / path.name for name, path in files.items()}, tmp_path / "out.safetensors")


def test_an_input_is_never_overwritten(files):
    before = files["beta"].read_bytes()
    with pytest.raises(UserError, match="an input and the output at once"):
        merged(files, files["beta"])
    assert files["beta"].read_bytes() == before


def test_published_base_passes_through_byte_for_byte(files, tmp_path):
    sha256 = hashlib.sha256(files["gamma"].read_bytes()).hexdigest()
    written = merge.copy_published_base(files["gamma"], sha256, tmp_path / "base.safetensors").written
    assert written.sha256 == sha256 and (tmp_path / "base.safetensors").read_bytes() == files["gamma"].read_bytes()
    with safetensors_io.open_file(files["gamma"]) as file:
        assert written.digest == file.digest()
    with pytest.raises(UserError, match="was expected"):
        merge.copy_published_base(files["gamma"], "0" * 64, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def stage(folder, start, *options):
    root = Path(__file__).parents[2]
    recipe = (root / "params.yaml").read_text().replace("start: merge ", f"start: {start} ")
    (folder / "params.yaml").write_text(recipe)
    return subprocess.run(
        [sys.executable, root / "stages" / "merge.py", *options], cwd=folder, capture_output=True, text=True
    )


def test_stage_merges_the_inputs_that_the_list_names(files, tmp_path):
    listed = {
        name: {"path": str(path), "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in files.items()
    }
    listed["delta_base"] = listed["gamma"]
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "inputs.json").write_text(json.dumps({"inputs": listed}))
    done = stage(tmp_path, "merge")
    assert (
        (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("merge: ") and done.stdout.count("\n") == 1
    )
    assert (tmp_path / "build" / "delta-base.safetensors").read_bytes() == (
        merged(files, tmp_path / "x.safetensors") and (tmp_path / "x.safetensors").read_bytes()
    )
    done = stage(tmp_path, "published")
    assert (
        done.returncode == 0
        and (tmp_path / "build" / "delta-base.safetensors").read_bytes() == files["gamma"].read_bytes()
    )


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda content: content[:-1000], "is cut short"),
        (lambda content: content[:100], "cut short or not safetensors"),
        (lambda content: b"\x80\x02}q\x00." + content, "is a pickle"),
        (lambda content: b"", "too few"),
    ],
)
def test_by_hand_a_damaged_parent_is_one_sentence_exit_code_1_and_nothing_left(files, tmp_path, damage, said):
    (tmp_path / "bad.safetensors").write_bytes(damage(files["beta"].read_bytes()))
    done = stage(
        tmp_path,
        "merge",
        "--sdxl",
        files["sdxl"],
        "--gamma",
        files["gamma"],
        "--beta",
        "bad.safetensors",
        "--out",
        "out.safetensors",
    )
    assert (
        done.returncode == 1
        and done.stdout == ""
        and done.stderr.startswith("Error: bad.safetensors ")
        and said in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "params.yaml"]
