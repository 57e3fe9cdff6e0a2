"""Slow: two emulated processors give this one's bits for every operator, two steps of a training and the preview.

    python -m pytest -m slow tests/integration/test_emulated.py

About 25 minutes on one core; needs qemu-user (Debian: apt-get install qemu-user). qemu's user mode runs the same
programs and libraries on another x86-64 processor, instruction by instruction. docs/processors.md says what it cannot
show.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import tiny_training

QEMU = shutil.which("qemu-x86_64")
MODELS = ["Haswell", "EPYC-Rome"]  # Intel's first with AVX2 and FMA; AMD's Zen 2: MKL and OpenBLAS choose by vendor
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not QEMU, reason="qemu-user is not installed (Debian: apt-get install qemu-user)"),
]


def python(model: str | None, *arguments, cwd=tiny_training.ROOT) -> str:
    """The output of a Python program, on this processor (None) or an emulated one."""
    emulator = [QEMU, "-cpu", model] if model else []
    done = subprocess.run(
        [*emulator, sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tiny_training.ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("model", MODELS)
def test_every_operator_gives_the_bits_of_an_emulated_processor(model):
    printed = python(model, "-m", "kohaku_delta", "operators")
    assert re.search(r"operators: (\d+) of \1 are equal", printed), printed


def build(folder):
    """The inputs of a small training and preview: two steps on one of the miniature's own checkpoints."""
    preview = {
        "steps": 3,
        "prompts": ["1girl, solo, circle, red body, blue sky, outdoors, safe"],
        "columns": 1,
        "held_out": 3,
    }
    sections = {
        "schedule": {"batch_size": 2, "micro_batches": 2, "lanes": 2},
        "preview": preview,
        "model": {"side": 128},
    }
    tiny_training.write(folder, 6, sections)
    shutil.copy(
        tiny_training.ROOT / "data" / "checkpoints" / "gamma.safetensors", folder / "build" / "delta-base.safetensors"
    )
    return folder


def train_and_draw(model, folder) -> dict[str, bytes]:
    stages, data = tiny_training.ROOT / "stages", tiny_training.ROOT / "data"
    python(model, stages / "train.py", "--ranks", 1, cwd=folder)
    python(model, stages / "bake.py", cwd=folder)
    python(model, stages / "select.py", "--database", data / "danbooru2023.db", cwd=folder)
    python(model, stages / "preview.py", "--database", data / "danbooru2023.db", cwd=folder)
    names = (
        "delta-lokr.safetensors",
        "journal.parquet",
        "curves.csv",
        "kohaku-xl-delta.safetensors",
        "preview.png",
        "held-out.json",
    )
    return {name: (folder / "build" / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return train_and_draw(None, build(tmp_path_factory.mktemp("native") / "training"))


@pytest.mark.parametrize("model", MODELS)
def test_two_steps_and_the_preview_are_byte_equal_on_an_emulated_processor(model, native, tmp_path):
    emulated = train_and_draw(model, build(tmp_path / "training"))
    assert json.loads(emulated["held-out.json"]) == json.loads(native["held-out.json"])
    assert [name for name in native if emulated[name] != native[name]] == []
