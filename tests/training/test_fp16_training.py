"""The release's precision, on the CPU: fp16 weights with a gradient scaler skip overflows and resume bit for bit."""

import math
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny_sdxl
import tiny_training
from kohaku_delta.formats import safetensors_io


@pytest.fixture(scope="module")
def trained_fp16(tmp_path_factory):
    """A finished training of three or more fp16 steps; the base's last convolution makes the first step overflow."""
    folder = tiny_training.write(
        tmp_path_factory.mktemp("half"), 24, precision="float16", weights="float16", keep_states=100
    )
    tensors = tiny_sdxl.tensors(1)
    tensors["model.diffusion_model.out.2.weight"] *= 10
    safetensors_io.save(
        folder / "build" / "delta-base.safetensors", {name: tensor.numpy() for name, tensor in tensors.items()}, None
    )
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def state(folder, step):
    return load_file(next(folder.glob(f"work/*/step-{step:08d}")) / "state.safetensors")


@pytest.mark.ci
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(trained_fp16):
    rows = tiny_training.journal(trained_fp16).to_pylist()
    assert len(rows) >= 3 and not math.isfinite(rows[0]["gradient_norm"])
    assert [row["scale"] for row in rows] == [65536.0] + [32768.0] * (len(rows) - 1)
    assert all(math.isfinite(row["gradient_norm"]) for row in rows[1:])
    first, second = state(trained_fp16, 1), state(trained_fp16, 2)
    assert not any(name.startswith("optimizer/") for name in first)
    assert all((array == 0).all() for name, array in first.items() if name.endswith("lokr_w2"))
    assert any((array != 0).any() for name, array in second.items() if name.endswith("lokr_w2"))


@pytest.mark.ci
def test_adapter_and_lokr_file_are_fp16(trained_fp16):
    weights = [array for name, array in state(trained_fp16, 3).items() if name.startswith("weights/")]
    assert {array.dtype for array in weights} == {np.dtype("float16")} and all(
        np.isfinite(array).all() for array in weights
    )
    tensors = load_file(trained_fp16 / "build" / "delta-lokr.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype("float16")}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_resumed_by_two_ranks_after_any_step_it_gives_the_same_bytes(trained_fp16, tmp_path, step):
    """After step 1 only the scale has changed; after step 2 there are 8-bit states and fp16 weights."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(
        trained_fp16,
        folder,
        ignore=lambda place, names: [name for name in names if name.startswith("step-") and name > f"step-{step:08d}"],
    )
    for name in tiny_training.OUTS:
        (folder / "build" / name).unlink()
    done = tiny_training.run(folder, ranks=2)
    assert done.returncode == 0, done.stderr
    assert tiny_training.outs(folder) == tiny_training.outs(trained_fp16)


@pytest.mark.slow
def test_killed_half_precision_training_resumes_to_the_same_bytes(trained_fp16, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(
        trained_fp16,
        folder,
        ignore=lambda place, names: [name for name in names if name in (*tiny_training.OUTS, "milestones", "work")],
    )
    process = subprocess.Popen(
        tiny_training.command(1), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.glob("work/*/step-00000002")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "build" / "delta-lokr.safetensors").exists()
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained_fp16)
