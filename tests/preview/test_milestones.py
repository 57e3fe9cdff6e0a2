"""The milestones measured: by the stage, and by `kohaku-delta watch` beside a training. Base and final model have the
numbers of the preview; the work folder keeps its bytes.
"""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import tiny_training
from kohaku_delta.danbooru.database import Database
from kohaku_delta.formats import parquet
from kohaku_delta.preview import measurement_files
from kohaku_delta.preview.measurement_files import Measurement
from kohaku_delta.training import run_folders

ROOT = Path(__file__).resolve().parents[2]
PREVIEW = {"prompts": ["circle", "star"], "steps": 2, "held_out": 6, "width": 64, "height": 64}
MINIATURE = ROOT / "miniature" / "build"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training of some three steps with milestones after steps 1 and 2, and the stages behind it. Its form
    is not SDXL's own, so both losses differ.
    """
    folder = tiny_training.write(
        tmp_path_factory.mktemp("recipe"),
        24,
        {"preview": PREVIEW},
        milestone_every=1,
        save_every=100,
        keep_states=1,
        timestep_freq_shift=1,
        learning_rate_unet=0.01,
    )
    database = Database(ROOT / "data" / "danbooru2023.db")
    ids = np.unique(database.post_ids())
    parquet.write(
        pa.table({"post_id": ids[:-12], "drawn": pa.array([1] * (len(ids) - 12), pa.int32())}),
        folder / "build" / "selection.parquet",
    )
    assert tiny_training.run(folder).returncode == 0
    for name in ("bake", "preview", "milestones"):
        done = stage(folder, name)
        assert done.returncode == 0, done.stderr
    return folder


def stage(folder, name, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "stages" / f"{name}.py"), *map(str, options)]
    environment = os.environ | {"PYTHONPATH": ""}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def watch(folder, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "src" / "kohaku_delta"), "watch", str(folder), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


def curve(path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def work(folder) -> Path:
    return next(folder.glob("work/*/depends.json")).parent


@pytest.fixture
def copy(trained, tmp_path):
    """The recipe's folder as it is during the training: no outputs of train and the stages behind it."""
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("delta-lokr.safetensors", "milestones*"))
    return tmp_path / "copy"


@pytest.mark.ci
def test_base_and_final_model_have_the_numbers_of_the_preview(trained):
    measured = json.loads((trained / "build" / "held-out.json").read_text())
    rows = curve(trained / "build" / "milestones.csv")
    assert [int(row["step"]) for row in rows] == list(range(len(rows))) and len(rows) >= 3
    for row, name in ((rows[0], "base"), (rows[-1], "final")):
        found = {"sdxl": float(row["held_out_loss"]), "training": float(row["held_out_loss_training"])}
        assert found == measured[name]["loss"] and found["sdxl"] != found["training"]
    assert len({row["held_out_loss"] for row in rows}) == len(rows)


@pytest.mark.ci
def test_nothing_temporary_stays(trained):
    assert not [path for path in (trained / "build").iterdir() if path.name.endswith(".aside")]


@pytest.mark.slow
def test_a_killed_stage_leaves_a_model_that_the_next_one_deletes(trained, tmp_path):
    outputs = ("--out", tmp_path / "milestones.csv", "--grid", tmp_path / "milestones.png")
    command = [sys.executable, str(ROOT / "stages" / "milestones.py"), *map(str, outputs)]
    process = subprocess.Popen(command, cwd=trained, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".*.aside/model.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".milestones.csv.00.aside"]
    assert stage(trained, "milestones", *outputs).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["milestones.csv", "milestones.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (trained / "build" / path.name).read_bytes()


@pytest.mark.slow
def test_a_damaged_or_foreign_milestone_is_named(trained, tmp_path):
    folder = tmp_path / "milestones"
    shutil.copytree(trained / "build" / "milestones", folder)
    first, second, *_ = sorted(folder.iterdir())
    whole = first.read_bytes()
    for content, words in (
        (whole[:-10], "cut short"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is damaged"),
        (second.read_bytes(), "was written after 2 steps, and its name says 1"),
        (None, ""),
    ):
        first.unlink()
        if content:
            first.write_bytes(content)
        done = stage(
            trained, "milestones", "--milestones", folder, "--out", tmp_path / "x.csv", "--grid", tmp_path / "x"
        )
        assert done.returncode == 1 and first.name in done.stderr and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "x.csv").exists()


def tree(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "watch" not in path.relative_to(folder).parts
    }


@pytest.mark.ci
def test_watch_gives_the_stages_numbers_and_touches_nothing_else(trained, copy):
    before = tree(copy)
    done = watch(copy)
    assert done.returncode == 0, done.stderr
    assert tree(copy) == before
    written = work(copy) / "watch"
    rows, expected = curve(written / "milestones.csv"), curve(trained / "build" / "milestones.csv")
    assert rows == expected
    assert (written / "milestones.png").read_bytes() == (trained / "build" / "milestones.png").read_bytes()
    assert not list(written.glob(".*"))


@pytest.mark.slow
def test_a_training_that_is_watched_while_it_holds_its_lock_gives_the_same_bytes(trained, copy):
    shutil.rmtree(copy / "work")
    process = subprocess.Popen(tiny_training.command(1), cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(copy.glob("work/*/step-00000001")):
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # in the middle of a step, or just before it
    before = tree(work(copy))
    done = watch(copy)
    assert done.returncode == 0 and tree(work(copy)) == before, done.stderr
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert tiny_training.outs(copy) == tiny_training.outs(trained)


@pytest.mark.slow
def test_watch_measures_only_what_is_new(copy, tmp_path):
    last = sorted(work(copy).glob("delta-lokr-step*"))[-1]
    last.rename(tmp_path / "later")
    assert watch(copy).returncode == 0
    times = {path: path.stat().st_mtime_ns for path in (work(copy) / "watch").glob("step-*/*")}
    (tmp_path / "later").rename(last)
    done = watch(copy)
    assert done.returncode == 0 and done.stdout.count("measured before") == len(done.stdout.splitlines()) - 3
    assert {path: path.stat().st_mtime_ns for path in times} == times
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace("circle", "square"))
    done = watch(copy)
    assert done.returncode == 0 and "measured before" not in done.stdout, "other prompts are other pictures"


def refused(*arguments) -> str:
    done = watch(*arguments)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.ci
def test_watch_says_what_is_missing(copy, tmp_path):
    assert "params.yaml" in refused(tmp_path)
    assert "torch finds 0 CUDA devices here" in refused(copy, "--device", "cuda:99") or torch.cuda.is_available()
    assert "is neither cpu nor cuda" in refused(copy, "--device", "tpu")
    assert "holds no training" in refused(copy, "--work", tmp_path / "nothing")
    (copy / "build" / "selection.parquet").rename(tmp_path / "selection.parquet")
    assert "selection.parquet does not exist" in refused(copy)


@pytest.mark.slow
def test_watch_names_a_milestone_that_is_cut_off_or_of_another_base(copy):
    first, second, *_ = sorted(work(copy).glob("delta-lokr-step*"))
    whole = first.read_bytes()
    first.write_bytes(whole[:1000])
    assert first.name in (message := refused(copy)) and "cut short" in message
    first.write_bytes(second.read_bytes())
    assert "was written after 2 steps, and its name says 1" in refused(copy)
    foreign = whole.replace(b'"ss_base_digest":"', b'"ss_base_digest":"0')  # one digit more: as long as one space less
    first.write_bytes(foreign[: len(whole)])
    assert first.name in refused(copy)


@pytest.mark.ci
def test_of_several_trainings_the_newest_unfinished_is_watched(copy):
    first = work(copy)
    for name, steps in (("0" * 16, 100), ("1" * 16, 100)):
        other = first.parent / name
        other.mkdir()
        (other / "depends.json").write_text(json.dumps({"steps": steps, "depends": {}}))
    os.utime(first.parent / ("0" * 16) / "depends.json", (1, 1))
    done = watch(copy)
    assert done.returncode == 0, done.stderr
    assert f"{'1' * 16}, 0 of 100 steps saved" in done.stdout and "no milestone yet" in done.stdout
    assert f"{'0' * 16} (0 of 100 steps), {first.name} (" in done.stdout
    assert [row["step"] for row in curve(first.parent / ("1" * 16) / "watch" / "milestones.csv")] == ["0"]


@pytest.mark.ci
def test_a_training_that_was_set_aside_can_be_watched(copy):
    first = work(copy)
    aside = run_folders.set_aside_path(first)
    first.rename(aside)
    done = watch(copy)
    assert done.returncode == 0 and f"watch: {aside}, " in done.stdout, done.stderr


@pytest.mark.ci
def test_two_watchers_of_one_training_do_not_write_into_each_others_files(copy):
    (work(copy) / "watch").mkdir()
    with open(work(copy) / "watch" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = watch(copy)
    assert done.returncode == 1 and "Another `kohaku-delta watch` uses" in done.stderr
    assert [path.name for path in (work(copy) / "watch").iterdir()] == ["lock"]


def test_without_a_held_out_post_the_curve_has_steps_and_the_grid_its_pictures(tmp_path):
    picture = np.zeros((32, 1024, 3), np.uint8)
    measured = {step: Measurement([picture], None) for step in (20, 0)}
    measurement_files.write_curve(tmp_path / "a.csv", measured)
    measurement_files.write_grid(tmp_path / "a.png", ["circle"], measured)
    assert (tmp_path / "a.csv").read_text() == "step,held_out_loss,held_out_loss_training\n0,,\n20,,\n"
    with Image.open(tmp_path / "a.png") as image:
        assert 2 * 256 < image.width < 3 * 256, "pictures are reduced to 256 pixels"


def test_the_last_row_of_the_miniature_is_its_held_out_loss():
    """For the miniature built here."""
    if not (MINIATURE / "milestones.csv").is_file():
        pytest.skip("the miniature is not built here (make repro)")
    rows, measured = curve(MINIATURE / "milestones.csv"), json.loads((MINIATURE / "held-out.json").read_text())
    assert [row["step"] for row in rows] == ["0", "20", "40", "58"]
    assert float(rows[0]["held_out_loss"]) == measured["base"]["loss"]["sdxl"]
    assert float(rows[-1]["held_out_loss"]) == measured["final"]["loss"]["sdxl"]
