"""`make gpu-check` on tiny models and the CPU: the code that a card runs, and what it says where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check
import tiny_sdxl
from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.training import optimizer
from kohaku_delta.units import format_size

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe():
    """The release's precision and preset; two lanes of one picture of 64 × 64."""
    release = gpu_check.check_recipe(load(ROOT / "params.yaml"))
    return release.model_copy(
        update={
            "schedule": release.schedule.model_copy(update={"batch_size": 1, "micro_batches": 2, "lanes": 2}),
            "model": release.model.model_copy(update={"side": 64}),
            "train": release.train.model_copy(update={"max_token_length": 75}),
        }
    )


@pytest.fixture(autouse=True)
def fixed_numerics():
    numerics.enforce()


def checked(recipe, folder) -> dict:
    figures = gpu_check.new_figures(load(ROOT / "params.yaml"))
    gpu_check.check_steps(recipe, tiny_sdxl.CONFIGS, "cpu", folder, figures)
    return figures


@pytest.fixture(scope="module")
def figures(recipe, tmp_path_factory):
    numerics.enforce()
    return checked(recipe, tmp_path_factory.mktemp("check"))


def test_a_step_again_saved_and_loaded_and_as_two_ranks_is_the_same(figures):
    assert all(ok for name, ok in figures["checks"].items() if name != "small_training")
    assert len(set(figures["fingerprints"].values())) == 3 and figures["journal_cost"] > 0
