"""kohaku-delta tensors: same bytes, same tensors, or where and by how much two checkpoints differ."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.cli.main import main
from kohaku_delta.formats import safetensors_io
from kohaku_delta.sdxl import model_loading
from kohaku_delta.sdxl.tensor_names import SDXL, TensorNameMap
from kohaku_delta.verify import compare_tensors, tensor_sources
from kohaku_delta.weights import export_diffusers, lokr_format

ROOT = Path(__file__).resolve().parents[2]
RECIPE = params.load(ROOT / "params.yaml")
OUT, QUANT = "model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "a.safetensors"
    tiny_sdxl.write(path, 1)
    return path


def ask(*arguments):
    done = CliRunner().invoke(main, ["tensors", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def changed(path, out, change, metadata=None):
    held = load_file(path)
    change(held)
    save_file(held, out, metadata)
    return out


def test_a_copy_has_the_same_bytes(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "b.safetensors")
    code, message = ask(checkpoint, tmp_path / "b.safetensors")
    assert code == 0 and message.startswith("same bytes: ") and message.count("\n") == 1
    assert ask(checkpoint, checkpoint)[0] == 0


def test_another_header_is_another_container_and_the_keys_are_named(checkpoint, tmp_path):
    changed(checkpoint, tmp_path / "b.safetensors", lambda held: None, {"modelspec.title": "x"})
    code, message = ask(checkpoint, tmp_path / "b.safetensors")
    assert (
        code == 0
        and message.startswith("same tensors in another container: all ")
        and "metadata differ: modelspec.title" in message
    )


def test_differences_are_counted_in_value_and_in_ulp(checkpoint, tmp_path):
    def change(held):
        held[OUT][0] = torch.nextafter(held[OUT][0].float(), torch.tensor(9.0)).half()  # the same number: nothing
        held[OUT][1] = (held[OUT][1].view(torch.int16) + 3).view(torch.float16)
        held[QUANT].view(-1)[:2] = torch.tensor([1.0, -1.0]).half()

    before = load_file(checkpoint)
    changed(checkpoint, tmp_path / "b.safetensors", change)
    after = load_file(tmp_path / "b.safetensors")
    found = {
        each.name: each for each in compare_tensors.compare_files(checkpoint, tmp_path / "b.safetensors").differences
    }
    assert set(found) == {OUT, QUANT}
    assert (found[OUT].unequal, found[OUT].ulps, found[OUT].dtype) == (1, 3, "F16")
    assert found[OUT].largest == (after[OUT].float() - before[OUT].float()).abs().max().item()
    assert (
        found[QUANT].unequal == 2
        and found[QUANT].largest == (after[QUANT].float() - before[QUANT].float()).abs().max().item()
    )
    code, message = ask(checkpoint, tmp_path / "b.safetensors")
    lines = message.splitlines()
    assert code == 1 and lines[0].startswith("different: ") and "2 differ" in lines[0]
    assert [line.split()[-1] for line in lines[-2:]] == [QUANT, OUT] and "75.0000 %" in lines[-1]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_neighbours_are_one_ulp_apart_across_zero_too(kind):
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    bits = {
        torch.float16: torch.int16,
        torch.bfloat16: torch.int16,
        torch.float32: torch.int32,
        torch.float64: torch.int64,
    }[kind]

    def measure(one, other):
        a, b = (torch.tensor([value], dtype=kind).view(bits).numpy() for value in (one, other))
        return compare_tensors.measure_difference(
            "x", *(each.view(tensor_sources.dtypes.NUMPY[names[kind]]) for each in (a, b)), names[kind], names[kind]
        )

    eps = torch.finfo(kind).eps
    assert measure(1.0, 1 + eps).ulps == measure(-1.0, -1 - eps).ulps == 1 and measure(1.0, 1 + eps).largest == eps
    tiny = torch.finfo(kind).smallest_normal * eps
    assert measure(tiny, -tiny).ulps == 2
    assert (measure(0.0, -0.0).unequal, measure(0.0, -0.0).ulps, measure(0.0, -0.0).largest) == (1, 0, 0.0)
    assert measure(float("nan"), float("nan")).unequal == 0 and measure(float("nan"), 1.0).largest == float("inf")
    assert measure(1.0, float("inf")).largest == float("inf")


def test_only_the_dtype_differs_is_said_when_it_is_so(checkpoint, tmp_path):
    other = tmp_path / "b.safetensors"
    changed(checkpoint, other, lambda held: held.update({name: held[name].float() for name in (OUT, QUANT)}))
    code, message = ask(checkpoint, other)
    kinds = f"2 of {len(load_file(checkpoint)):,} tensors are F16 in {checkpoint} and F32 in {other}"
    assert code == 1 and message == f"only the dtype differs: {kinds}; every value is equal\n"


def test_a_rounded_copy_differs_in_its_dtype_only_and_one_other_value_is_more(tmp_path):
    values = {"x": torch.randn(4000, generator=torch.Generator().manual_seed(1)), "y": torch.arange(4)}
    save_file(values, tmp_path / "a.safetensors")
    save_file(values | {"x": values["x"].bfloat16()}, tmp_path / "b.safetensors")
    code, message = ask(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 1 and message.startswith("only the dtype differs: 1 of 2 tensors are F32 in ")
    assert message.endswith("every value is equal once it is rounded to the coarser dtype\n")
    for other in (
        {"x": torch.cat([values["x"].bfloat16()[:-1], torch.tensor([9.0]).bfloat16()])},  # another value
        {"x": values["x"].bfloat16(), "y": torch.arange(1, 5)},  # another tensor
        {"x": values["x"].bfloat16(), "z": torch.zeros(1)},  # one more tensor
    ):
        save_file(values | other, tmp_path / "b.safetensors")
        assert ask(tmp_path / "a.safetensors", tmp_path / "b.safetensors")[1].startswith("different: ")
    save_file({"x": torch.tensor([1e5])}, tmp_path / "a.safetensors")
    save_file({"x": torch.tensor([1e5]).half()}, tmp_path / "b.safetensors")  # infinite: more than another dtype
    assert ask(tmp_path / "a.safetensors", tmp_path / "b.safetensors")[1].startswith("different: ")


def test_a_lokr_is_the_same_under_the_names_of_another_trainer(trained, tmp_path):
    lokr_format.write_lokr(tmp_path / "a.safetensors", trained, RECIPE, "base")
    held = load_file(tmp_path / "a.safetensors")
    entries = {entry.lora: entry for entry in TensorNameMap(SDXL).entries if entry.path.endswith(".weight")}

    def renamed(name: str, prefix: str) -> str:
        module, _, suffix = name.partition(".")
        path = entries[module].path.removesuffix(".weight").removeprefix("text_model.").replace(".", "_")
        return f"{prefix.format(part=entries[module].part)}_{path}.{suffix}"

    theirs = {renamed(name, "lora_{part}"): value for name, value in held.items()}
    assert len(theirs.keys() - held.keys()) > 100
    save_file(theirs, tmp_path / "b.safetensors")
    code, message = ask(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 0 and message.startswith(f"same tensors in another container: all {len(held):,} are equal")
    assert "have the names of another trainer, of the same layers" in message
    unet = {name: value for name, value in held.items() if name.startswith("lora_unet_")}
    save_file({renamed(name, "lycoris"): value * 2 for name, value in unet.items()}, tmp_path / "c.safetensors")
    code, message = ask(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert code == 1 and "differences kron(w1, w2)" in message, "compared by product too"
    twice = {"lora_unet_input_blocks_0_0.diff": torch.zeros(2), "lora_unet_conv_in.diff": torch.zeros(2)}
    save_file(twice, tmp_path / "d.safetensors")
    code, message = ask(tmp_path / "d.safetensors", tmp_path / "d.safetensors")
    assert code == 2 and "two names of one layer" in message


def test_missing_and_other_shaped_tensors_are_listed(checkpoint, tmp_path):
    def change(held):
        del held[OUT]
        held["new"] = torch.zeros(1)
        held[QUANT] = held[QUANT].flatten(1)

    code, message = ask(checkpoint, changed(checkpoint, tmp_path / "b.safetensors", change))
    assert (
        code == 1
        and f"only in {checkpoint}:\n  {OUT}\n" in message
        and f"only in {tmp_path / 'b.safetensors'}:\n  new\n" in message
    )
    assert f"{QUANT}: F16 [8, 8, 1, 1] against F16 [8, 8]" in message


@pytest.fixture(scope="module")
def trained(checkpoint):
    models = model_loading.load(checkpoint, tiny_sdxl.MODEL)
    adapters = tiny_sdxl.lokr(models, RECIPE.lokr.preset)
    return {
        f"{name}.{suffix}": weight.detach().numpy()
        for name, adapter in adapters.items()
        for suffix, weight in adapter.named_parameters()
    }


def test_lokr_files_are_compared_by_their_product_not_by_their_factors(trained, tmp_path):
    trained = {name: np.round(weight * 64) / 64 for name, weight in trained.items()}
    lokr_format.write_lokr(tmp_path / "a.safetensors", trained, RECIPE, "base")
    other = {
        name: weight * (2 if name.endswith("lokr_w1") else 0.5 if name.endswith("lokr_w2") else 1)
        for name, weight in trained.items()
    }
    lokr_format.write_lokr(tmp_path / "b.safetensors", other, RECIPE, "base")
    code, message = ask(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 0 and message.startswith("same LoKr from other factors: all ")
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    other[f"{name}.lokr_w2"] = other[f"{name}.lokr_w2"] + np.float32(0.25)
    lokr_format.write_lokr(tmp_path / "b.safetensors", other, RECIPE, "base")
    found = compare_tensors.compare_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors", piece=1000)
    assert [each.name for each in found.differences] == [f"{name}.weight"] and found.by_product
    a, b = (load_file(tmp_path / f"{which}.safetensors") for which in "ab")
    a, b = (
        torch.kron(held[f"{name}.lokr_w1"].float()[..., None, None], held[f"{name}.lokr_w2"].float()) for held in (a, b)
    )
    assert found.differences[0].largest == (a - b).abs().max().item() and found.differences[0].count == a.numel()


def test_a_full_matrix_and_its_factoring_are_the_same_lokr(tmp_path):
    w1, left, right = torch.ones(4, 3), torch.randn(5, 2).round(), torch.randn(2, 6 * 9).round()
    save_file(
        {
            "lora_unet_x.lokr_w1": w1,
            "lora_unet_x.lokr_w2_a": left,
            "lora_unet_x.lokr_w2_b": right,
            "lora_unet_x.alpha": torch.tensor(2.0),
        },
        tmp_path / "a.safetensors",
    )
    save_file(
        {
            "lora_unet_x.lokr_w1": w1,
            "lora_unet_x.lokr_w2": (left @ right).reshape(5, 6, 3, 3),
            "lora_unet_x.alpha": torch.tensor(9.0),
        },
        tmp_path / "b.safetensors",
    )
    assert ask(tmp_path / "a.safetensors", tmp_path / "b.safetensors")[0] == 0


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    place = tmp_path_factory.mktemp("folder")
    words = (
        {"!": 0} | {f"filler{i}": i for i in range(1, 998)} | {export_diffusers.BEGIN: 998, export_diffusers.END: 999}
    )
    (place / "vocab.json").write_text(json.dumps(words))
    (place / "merges.txt").write_text("#version: 0.2\n")
    files = place / "vocab.json", place / "merges.txt"
    export_diffusers.export(
        checkpoint, {"tokenizer": files, "tokenizer_2": files}, tiny_sdxl.MODEL, place / "diffusers"
    )
    return place / "diffusers"


def test_folders_are_compared_and_their_configurations_are_named(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    assert ask(folder, other)[1].startswith("same bytes")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    code, message = ask(folder, other)
    assert code == 0 and "other files differ: vae/config.json" in message
    place = other / "text_encoder" / "model.safetensors"
    renamed = {name.removeprefix("text_model."): value for name, value in load_file(place).items()}
    save_file(renamed | {"final_layer_norm.bias": renamed["final_layer_norm.bias"] + 1}, place)
    code, message = ask(folder, other)
    assert code == 1 and message.splitlines()[4].split()[-1] == "text_encoder/final_layer_norm.bias"


def test_a_folder_is_compared_with_the_single_file_that_it_came_from(checkpoint, folder, tmp_path):
    for pair in ((checkpoint, folder), (folder, checkpoint)):
        code, message = ask(*pair)
        assert code == 0 and "one is a folder, the other a single file" in message and "position_ids" in message
    for name in (
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_bias",
    ):

        def add_one(tensors, name=name):
            tensors[name].view(-1)[1].add_(1)

        code, message = ask(folder, changed(checkpoint, tmp_path / "b.safetensors", add_one))
        assert code == 1 and "1 differ" in message and "text_encoder_2/" in message.splitlines()[-2]


def test_same_answer_for_any_piece_size_and_number_of_threads(checkpoint, tmp_path):
    tiny_sdxl.write(tmp_path / "b.safetensors", 2)
    found = [
        compare_tensors.compare_files(checkpoint, tmp_path / "b.safetensors", threads, numbers)
        for threads, numbers in ((1, 100), (2, 4096), (3, 1 << 20))
    ]
    assert found[0] == found[1] == found[2] and found[0].elements > found[0].unequal > 0


def test_published_files_are_known_by_their_hash(checkpoint, tmp_path):
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(ROOT / "params.yaml")
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    code, message = ask(checkpoint, "--published")
    assert (
        code == 1
        and sha256 in message
        and "is not one of published.base, published.final, published.lokr, published.milestones.24000, "
        "download.inputs.database"
        in message
    )
    content["published"]["final"]["sha256"] = sha256
    content["download"]["inputs"]["gamma"]["sha256"] = sha256[:10]
    yaml.dump(content, tmp_path / "params.yaml")
    code, message = ask(checkpoint, "--published", "--params", tmp_path / "params.yaml")
    assert (
        code == 0
        and f"is published.final of {tmp_path / 'params.yaml'}\n" in message
        and "by the 10 digits that are known" in message
    )
    assert ask(checkpoint, "--published", "--params", ROOT / "miniature" / "params.yaml")[0] == 2


def test_what_cannot_be_compared_is_a_sentence_and_exit_code_2(checkpoint, folder, trained, tmp_path):
    lokr_format.write_lokr(tmp_path / "lokr.safetensors", trained, RECIPE, "base")
    (tmp_path / "bad.safetensors").write_bytes(checkpoint.read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "unet").mkdir(parents=True)
    for variant in ("a", "b"):
        safetensors_io.save(tmp_path / "odd" / "unet" / f"{variant}.safetensors", {"x": np.zeros(1, np.float32)})
    cases = {
        (checkpoint, tmp_path / "lokr.safetensors"): "have no tensor in common",
        (checkpoint, tmp_path / "nowhere"): "does not exist",
        (checkpoint, tmp_path / "bad.safetensors"): "is cut short",
        (folder, tmp_path / "empty"): "is a folder without unet",
        (folder, tmp_path / "lokr.safetensors"): "not an SDXL checkpoint",
        (folder, tmp_path / "odd"): "two tensors unet/x",
        (checkpoint,): "Give a second path",
        (checkpoint, checkpoint, "--published"): "Give a second path",
        (folder, "--published"): "is a folder",
    }
    for arguments, sentence in cases.items():
        code, message = ask(*arguments)
        assert code == 2 and sentence in message, arguments


def test_it_runs_as_a_module_and_never_loads_torch(checkpoint):
    code = (
        "import runpy, sys; sys.path.insert(0, 'src'); sys.argv = ['x', 'tensors', *sys.argv[1:]]\n"
        "try: runpy.run_module('kohaku_delta', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint, checkpoint], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[1:] == ["0 False"], done.stderr
