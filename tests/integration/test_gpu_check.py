"""`make gpu-check` on tiny models and the CPU: the code that a card runs, and what it says where there is none."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import gpu_check
import memory_plan
import tiny_release
import tiny_sdxl
from kohaku_delta import numerics
from kohaku_delta.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OF_STEPS = [name for name in gpu_check.CHECKS if name != "small_training"]


def checked(folder) -> dict:
    """The figures of check_steps on tiny models."""
    numerics.enforce()
    figures = gpu_check.new_figures(tiny_release.recipe())
    gpu_check.check_steps(tiny_release.recipe(), tiny_sdxl.CONFIGS, "cpu", folder, figures)
    return figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return checked(tmp_path_factory.mktemp("check"))


@pytest.mark.ci
def test_a_step_again_saved_and_loaded_and_as_two_ranks_is_the_same(figures):
    assert [figures["checks"][name] for name in OF_STEPS] == [True] * len(OF_STEPS)
    assert len(set(figures["fingerprints"].values())) == 3 and figures["journal_cost"] > 0


@pytest.mark.slow
def test_what_is_drawn_is_the_same_in_every_run(figures, tmp_path):
    """The fingerprints are compared between machines."""
    assert checked(tmp_path)["fingerprints"] == figures["fingerprints"]


@pytest.mark.ci
def test_a_card_that_computes_otherwise_the_second_time_is_found(tmp_path, monkeypatch):
    drawn, seen = gpu_check.drawn_batch, set()

    def other_noise_the_second_time(recipe, words, seed):
        batch = drawn(recipe, words, seed)
        if seed in seen:
            batch.noise[0, 0, 0, 0] += 1e-3
        seen.add(seed)
        return batch

    monkeypatch.setattr(gpu_check, "drawn_batch", other_noise_the_second_time)
    checks = checked(tmp_path)["checks"]
    assert checks["finite"] and checks["loaded"]
    assert not checks["deterministic"] and not checks["resumed"] and not checks["two_ranks"]


@pytest.mark.slow
def test_a_wrong_sum_over_the_ranks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.gradient_reduction, "all_reduce_tree", lambda part, ranks: part)
    checks = checked(tmp_path)["checks"]
    assert checks["resumed"] and not checks["two_ranks"]


@pytest.mark.slow
def test_a_step_that_overflows_is_repeated_with_a_smaller_scale(tmp_path, monkeypatch):
    fill = gpu_check.fill_with_drawn_numbers

    def large(device):
        filled = fill(device)

        def larger(module):
            filled(module)
            if hasattr(module, "conv_out") and hasattr(module, "time_proj"):  # the U-Net
                module.conv_out.weight.data *= 30

        return larger

    monkeypatch.setattr(gpu_check, "fill_with_drawn_numbers", large)
    figures = checked(tmp_path)
    assert figures["overflows"] and all(figures["checks"][name] for name in OF_STEPS)


@pytest.mark.ci
def test_every_form_of_the_lokr_is_timed_with_one_model_in_memory_at_a_time(figures, monkeypatch):
    numerics.enforce()
    drawn, alive = gpu_check.drawn_context, []

    def count(*arguments):
        alive.append(sum(type(each) is torch.nn.Linear for each in gc.get_objects()))
        return drawn(*arguments)

    monkeypatch.setattr(gpu_check, "drawn_context", count)
    gpu_check.free_memory()
    gc.disable()  # it would collect in time by chance
    try:
        gpu_check.measure_forms(tiny_release.recipe(), tiny_sdxl.CONFIGS, "cpu", 1, figures)
    finally:
        gc.enable()
    gpu_check.measure_layouts(tiny_release.recipe(), tiny_sdxl.CONFIGS, "cpu", 1, figures)
    assert len(alive) == 3 and len(set(alive)) == 1
    assert all(figures[name] > 0 for name in figures if "ratio" in name) and figures["images_per_second"] > 0
    table = gpu_check.table(figures)
    assert "| the step again: same losses and gradient of each lane | yes |" in table
    assert "| peak of a step (planned) | not measured (not measured) |" in table  # of a GPU's memory


@pytest.mark.ci
def test_without_a_card_one_line_says_what_is_not_measured():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (line,) = done.stdout.splitlines()
    assert done.returncode == 0 and line.startswith("no CUDA card here: ") and "not measured" in line


@pytest.fixture
def card(monkeypatch):
    """A card as torch describes one; `free` and `total` bytes may be set."""
    sizes = SimpleNamespace(free=25 * 10**9, total=25 * 10**9)
    properties = SimpleNamespace(name="A card", total_memory=sizes.total, major=8, minor=6, multi_processor_count=82)
    monkeypatch.setattr(numerics, "cuda_error", lambda: "")
    for name, value in {
        "get_device_name": "A card",
        "get_device_properties": properties,
        "empty_cache": None,
        "mem_get_info": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (sizes.free, sizes.total))
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 29, 7)))
    monkeypatch.setattr(memory_plan, "peak_bytes", lambda *_: {"weights": 8 * 10**9, "lanes": 19 * 10**9})
    return sizes


def run(monkeypatch, tmp_path, check_steps, small_training=True):
    monkeypatch.setattr(gpu_check, "check_steps", check_steps)
    monkeypatch.setattr(gpu_check, "measure_forms", lambda *arguments: arguments[-1].update(images_per_second=1.5))
    monkeypatch.setattr(gpu_check, "measure_layouts", lambda *_: None)
    monkeypatch.setattr(
        gpu_check, "run_small_training", lambda figures: figures["checks"].update(small_training=small_training)
    )
    done = CliRunner().invoke(gpu_check.main, ["--work", str(tmp_path)])
    return done, json.loads((tmp_path / "gpu-check.json").read_text())


def all_equal(recipe, configs, device, folder, figures):
    assert device == "cuda" and recipe.schedule.micro_batches == recipe.schedule.lanes == 8
    figures["checks"].update(dict.fromkeys(OF_STEPS, True))


def test_a_card_that_holds_all_ends_with_a_table_and_its_figures(card, monkeypatch, tmp_path):
    done, figures = run(monkeypatch, tmp_path, all_equal)
    assert done.exit_code == 0, done.output
    assert (figures["card"], figures["planned_peak_gib"], figures["numerics"]["multiprocessors"]) == (
        "A card",
        17.7,
        "82",
    )
    assert "| card | A card, driver " in done.output and set(gpu_check.LIBRARIES) < set(figures["versions"])


def test_a_card_that_breaks_a_promise_is_an_error_that_names_it(card, monkeypatch, tmp_path):
    done, figures = run(monkeypatch, tmp_path, all_equal, small_training=False)
    assert done.exit_code == 1 and "does not hold: tests/integration/test_cuda.py." in done.output
    assert figures["checks"]["small_training"] is False


def test_a_card_of_12_gb_is_refused_before_the_first_step(card, monkeypatch, tmp_path):
    card.free, card.total = 12_400_000_000, 12_900_000_000
    done, figures = run(monkeypatch, tmp_path, lambda *_: pytest.fail("a step was begun"))
    assert done.exit_code == 1 and done.output.strip().splitlines()[-1].startswith("Error: A card has 12.9 GB")
    assert "12.4 GB are free" in done.output and "19 GB (planned)" in done.output
    assert set(figures["checks"].values()) == {None}


def test_a_card_that_another_program_uses_is_refused_too():
    with pytest.raises(UserError, match="4 GB are free.*end the programs"):
        gpu_check.require_memory("A card", 25 * 10**9, 4 * 10**9, 19 * 10**9)


def test_a_card_whose_memory_ends_in_a_step_keeps_what_was_measured(card, monkeypatch, tmp_path):
    def full(recipe, configs, device, folder, figures):
        figures["checks"]["finite"] = True
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.44 GiB.")

    done, figures = run(monkeypatch, tmp_path, full)
    assert done.exit_code == 1 and "The GPU's memory is full" in done.output and figures["checks"]["finite"]
