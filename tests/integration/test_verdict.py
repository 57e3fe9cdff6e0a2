"""The last line of `make repro` tells changed outputs from changed code."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "miniature"
spec = importlib.util.spec_from_file_location("verdict", FOLDER / "verdict.py")
verdict = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verdict)

LOCK = (FOLDER / "dvc.lock").read_text()


def with_md5(path: str) -> str:
    """The lock with another md5 at every mention of a path."""
    lines = LOCK.splitlines()
    for number, line in enumerate(lines):
        if line.endswith(f"path: {path}"):
            lines[number + 2] = "      md5: " + "0" * 32
    return "\n".join(lines) + "\n"


def test_an_equal_lock_is_unchanged():
    assert verdict.compare(LOCK, LOCK) == "unchanged: the same model, bit for bit"


def test_changed_code_with_equal_outputs_is_said_to_be_that():
    for path in ("../src", "build/code/train.json"):
        assert with_md5(path) != LOCK
        assert "every output is unchanged: the same model, bit for bit" in verdict.compare(LOCK, with_md5(path))


def test_a_changed_output_is_named_with_its_stage():
    said = verdict.compare(LOCK, with_md5("build/kohaku-xl-delta.safetensors"))
    assert said.startswith("CHANGED: other outputs than committed (bake: build/kohaku-xl-delta.safetensors)")


def test_a_stage_that_only_one_of_the_two_has_is_a_change():
    assert verdict.compare(LOCK, "schema: '2.0'\nstages: {}\n").startswith("CHANGED")
