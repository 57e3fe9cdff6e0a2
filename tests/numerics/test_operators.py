"""Training, VAE and sampler run no operator whose bits depend on the processor; the digests are measured here and under
emulation (test_emulated.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_training
from kohaku_delta import numerics
from kohaku_delta.numerics import operators
from kohaku_delta.params import load
from kohaku_delta.preview import sampler
from kohaku_delta.training import batch_builder, run_inputs, training_context
from kohaku_delta.training.sdxl_model import SDXL
from kohaku_delta.training.training_loop import TrainingLoop

RELEASE_FORM = "fp16, in the release's form"
VARIANTS = {
    "from the factors": {},
    "through the whole difference, checkpointed": {
        "sections": {"lokr": {"forward": "delta"}},
        "gradient_checkpointing": True,
    },
    "weight decomposition": {"sections": {"lokr": {"forward": "delta", "dora": True}}},
    RELEASE_FORM: {
        "precision": "float16",
        "weights": "float16",
        "timestep_freq_shift": 1,
        "text_projection": "transposed",
    },
}


class UnknownOperators(TorchDispatchMode):
    """Collects the operators on CPU tensors that operators.py does not know."""

    def __init__(self):
        super().__init__()
        self.count, self.found = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        on_cpu = any(
            isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
            for leaf in _pytree.tree_leaves((args, kwargs, result))
        )
        if on_cpu:
            self.count += 1
            if not operators.is_known(str(function), args):
                self.found.add(str(function))
        return result


@pytest.mark.ci
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name in ("from the factors", RELEASE_FORM) else pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_every_operator_of_a_step_of_the_vae_and_of_the_sampler_is_known(variant, tmp_path):
    numerics.enforce()
    folder = tiny_training.write(tmp_path / "training", 4, **VARIANTS[variant])
    recipe, build = load(folder / "params.yaml"), folder / "build"
    files = {name: build / f"{name}.parquet" for name in ("posts", "captions", "schedule")}
    files |= {
        "inputs": build / "inputs.json",
        "base": build / "delta-base.safetensors",
        "tokenizer": None,
        "tokenizer_2": None,
        "tars": None,
    }
    _, tokenizers = run_inputs.load_tokenizers(files)
    with UnknownOperators() as unknown:
        context = training_context.build_context(recipe, files, tokenizers, run_inputs.tar_paths(files), "cpu")
        loop = TrainingLoop(recipe, context, folder / "work")
        loop.step(0, batch_builder.load_batches(context.builder, loop.schedule, loop.rows(0), 0))
        if recipe.train.precision == "float32":
            model = training_context.load_sdxl(recipe, files["base"], tokenizers, "cpu", torch.float32, SDXL)
            sampler.sample_images(
                model, tokenizers, recipe.preview.model_copy(update={"steps": 2, "prompts": ["circle"]}), 8, 75
            )
    assert unknown.count > 10_000 and unknown.found == set(), (
        "make them exact (numpy's square root, a table), or measure them: operators.MEASURED"
    )


@pytest.mark.parametrize(
    "compute", [torch.sqrt, torch.rsqrt, lambda x: x**0.5, torch.log, lambda x: x.std(), lambda x: x.cpu().erf()]
)
def test_an_operator_that_may_differ_between_processors_is_found(compute):
    with UnknownOperators() as unknown:
        compute(torch.rand(64))
    assert unknown.found


def test_the_digests_of_this_processor_are_the_committed_ones():
    numerics.enforce()
    assert operators.digests() == operators.known(), (
        "compare with `kohaku-delta operators`: this processor, or this process's settings, give other bits"
    )


LIBRARIES = (
    "numpy: random numbers",
    "numpy: square roots",
    "OpenCV: INTER_AREA",
    "OpenCV: blur, Lab",
    "Pillow: WebP, JPEG, PNG",
)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"OPENCV_CPU_DISABLE": "AVX512-SKX"}, marks=pytest.mark.slow),
        {"OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FP16,AVX"},
        pytest.param({"OPENCV_IPP": "disabled"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_numpy_opencv_and_pillow_give_the_same_bytes_with_other_kernels(environment):
    """What emulation does not cover: each library with the kernels of older processors, in its own process."""
    code = (
        "import json; from kohaku_delta.numerics import operators as o; "
        f"print(json.dumps({{name: o.digest(o.MEASURED[name][1]()) for name in {LIBRARIES!r}}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert json.loads(done.stdout) == {name: operators.known()[name] for name in LIBRARIES}, done.stderr


def test_numpy_runs_without_avx512_in_every_stage():
    """The package sets the variable before it, or any stage, imports numpy."""
    code = (
        "import sys, kohaku_delta; assert 'numpy' not in sys.modules; "
        "from numpy._core._multiarray_umath import __cpu_features__ as found; "
        "print(found['X86_V4'], found['AVX512_SKX'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NPY_")}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_command_names_the_operator_that_differs(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from kohaku_delta.cli.main import main

    done = CliRunner().invoke(main, ["operators"])
    assert done.exit_code == 0 and f"{len(operators.MEASURED)} of {len(operators.MEASURED)} are equal" in done.output
    (tmp_path / "operators.json").write_text(json.dumps(operators.known() | {"softmax": "0" * 16}))
    monkeypatch.setattr(operators, "KNOWN", Path(tmp_path / "operators.json"))
    done = CliRunner().invoke(main, ["operators"])
    assert done.exit_code == 1 and "DIFFERS  softmax" in done.output and "these differ: softmax" in done.output
