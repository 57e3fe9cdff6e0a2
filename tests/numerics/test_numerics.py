"""The host's settings do not change the bits; fixing the numerics too late is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import hashlib, sys
sys.path[:0] = ["src", "tests/helpers"]
from kohaku_delta import numerics
numerics.enforce("cpu")
import torch, tiny_sdxl
from kohaku_delta.sdxl import model_loading
unet = model_loading.build(tiny_sdxl.CONFIGS, ("unet",))["unet"]
numbers = torch.Generator().manual_seed(1)
weights = {name: torch.randn(value.shape, generator=numbers) * 0.05 for name, value in unet.state_dict().items()}
unet.load_state_dict(weights, assign=True)
for weight in unet.parameters(): weight.requires_grad_(True)
x, context = torch.randn(2, 4, 16, 16, generator=numbers), torch.randn(2, 227, 112, generator=numbers)
conditions = {"text_embeds": torch.randn(2, 64, generator=numbers), "time_ids": torch.full((2, 6), 128.0)}
unet(x, torch.tensor([5, 900]), context, added_cond_kwargs=conditions, return_dict=False)[0].square().mean().backward()
print(hashlib.sha256(b"".join(weight.grad.numpy().tobytes() for weight in unet.parameters())).hexdigest())
"""


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=kept | environment
    )


@pytest.mark.ci
def test_the_hosts_settings_change_no_bit_of_a_step():
    plain = run(STEP)
    other = run(
        STEP,
        OMP_NUM_THREADS="2",
        MKL_NUM_THREADS="2",
        ATEN_CPU_CAPABILITY="default",
        MKL_CBWR="AUTO",
        ONEDNN_MAX_CPU_ISA="SSE41",
        TZ="Asia/Tokyo",
        LC_ALL="C",
        PYTHONHASHSEED="7",
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == other.stdout and len(plain.stdout) == 65


def test_torch_loaded_too_early_is_refused():
    done = run(
        "import sys; sys.path.insert(0, 'src'); import torch; from kohaku_delta import numerics; numerics.prepare()"
    )
    assert done.returncode and "torch was loaded before" in done.stderr


def test_cuda_that_is_not_there_is_refused():
    done = run(
        "import sys; sys.path.insert(0, 'src'); from kohaku_delta import numerics; numerics.enforce('cuda')",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode and "no CUDA device here (" in done.stderr


def test_torchs_reason_for_finding_no_cuda_device_is_told(monkeypatch):
    import torch

    from kohaku_delta import numerics

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080). Please update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert numerics.cuda_error() == "The NVIDIA driver on your system is too old (found version 12080)"


def test_a_patch_release_of_python_is_no_other_contract_and_a_minor_one_is():
    code = """
import platform, sys; sys.path.insert(0, 'src')
platform.python_version = lambda: '3.11.99'
from kohaku_delta import numerics; numerics.enforce(); print(numerics.describe('cpu')['python'])
sys.version_info = (3, 12, 0)
numerics.prepare()
"""
    done = run(code)
    assert done.stdout == "3.11\n" and "locked for 3.11" in done.stderr
