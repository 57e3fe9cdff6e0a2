"""A pilot's report says what its record, log and lock say, tells equal from different, and measures nothing itself."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import rebuild_factory
import tiny_training
from kohaku_delta.cli import pilot_report
from kohaku_delta.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
LOG = "step,seconds,images_per_second,peak_mib,ranks\n"
NUMERICS = {
    "device": "cuda",
    "gpu": "Card | of [mine]",
    "architecture": "8.6",
    "multiprocessors": "82",
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
}
HOST = {"processor": "one", "driver": "580.65.06"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A made-up build of eight steps on a card, with its log: step 3 was computed again after a stop."""
    folder = rebuild_factory.write(tmp_path_factory.mktemp("pilot") / "own")
    revision = {"commit": "ab" * 20, "dirty": False}
    rebuild_factory.records(folder, numerics=NUMERICS, host=HOST, revision=revision)
    seconds = [90.0, 40.0, 41.0, 7.0, 42.0, 43.0, 44.0, 45.0]
    rows = [f"{step},{each},1.0,{18_000 + step},1\n" for step, each in enumerate(seconds)]
    (run_folder(folder) / "log.csv").write_text(LOG + "".join(rows[:4]) + "3,43.0,1.0,18003,1\n" + "".join(rows[4:]))
    return folder


@pytest.fixture
def pilot(finished, tmp_path, monkeypatch):
    """A copy of it; steps that are computed again are equal."""
    folder = tmp_path / "own"
    shutil.copytree(finished, folder)
    rebuild_factory.dump(folder / "params.yaml", rebuild_factory.loaded(folder / "params.yaml") | {"root": str(ROOT)})
    monkeypatch.setattr(pilot_report, "_replay", lambda folder, step: "equal")
    return folder


def run_folder(folder):
    return next((folder / "work").iterdir())


def report(folder):
    done = CliRunner().invoke(main, ["pilot-report", str(folder)])
    return done, json.loads((folder / "build" / "pilot.json").read_text()) if done.exit_code < 2 else None


def test_the_report_says_what_record_log_and_files_say(pilot):
    done, found = report(pilot)
    assert done.exit_code == 0, done.output
    lokr = hashlib.sha256((pilot / "build" / "delta-lokr.safetensors").read_bytes()).hexdigest()
    assert (found["lokr_sha256"], found["card"], found["driver"], found["torch"]) == (
        lokr, "Card | of [mine]", "580.65.06", "2.13.0+cu130",
    )  # fmt: skip
    assert (found["steps"], found["ranks"], found["commit"], found["changed"]) == (8, 1, "ab" * 20, False)
    assert found["seconds_per_step"] == 43.0 and found["peak_mib"] == 18_007  # of 40 41 42 43 43 44 45 90
    assert found["lock_sha256"] == hashlib.sha256((ROOT / "requirements" / "cpu.txt").read_bytes()).hexdigest()
    assert [Path(url).name for url in found["tars"]] == ["data-0004.tar"]
    assert found["replayed"] == {"0": "equal", "4": "equal", "7": "equal"}
    row = (pilot / "build" / "pilot.md").read_text().strip()
    assert row in done.output and "not measured" in row and "Card \\| of \\[mine\\]" in row and lokr in row


def test_the_row_fits_the_table_of_the_docs(pilot):
    report(pilot)
    row = (pilot / "build" / "pilot.md").read_text().strip()
    header = next(line for line in (ROOT / "docs" / "hosts.md").read_text().splitlines() if "LoKr sha256 |" in line)
    assert header.count("|") == row.replace("\\|", "").count("|")


def test_what_determinism_costs_is_that_of_the_same_card_or_not_measured(pilot, monkeypatch, tmp_path):
    from kohaku_delta.report import pilot_report as reports

    check = tmp_path / "gpu-check.json"
    monkeypatch.setattr(reports, "GPU_CHECK", str(check))
    for card, cost in (("Card | of [mine]", 0.083), ("another", None)):
        check.write_text(json.dumps({"card": card, "driver": "1", "deterministic_cost": 0.083, "peak_gib": 17.9}))
        assert report(pilot)[1]["deterministic_cost"] == cost
    check.write_text(json.dumps({"card": 3, "deterministic_cost": "much"}))
    done, _ = report(pilot)
    assert done.exit_code == 2 and "gpu-check.json" in done.output and "make gpu-check" in done.output


def test_a_step_that_differs_is_reported_and_is_the_exit_code(pilot, monkeypatch):
    monkeypatch.setattr(pilot_report, "_replay", lambda folder, step: "equal" if step != 4 else "step 4: lane 2")
    done, found = report(pilot)
    assert done.exit_code == 1 and found["replayed"]["4"] == "step 4: lane 2" and "2 of 3 equal" in done.output


def test_the_digest_of_the_inputs_knows_neither_card_nor_code(pilot):
    _, before = report(pilot)
    path = run_folder(pilot) / "depends.json"
    content = json.loads(path.read_text())
    content["depends"] |= {"numerics gpu": "another", "code of src/x.py": "0", "library torch": "1"}
    path.write_text(json.dumps(content))
    assert report(pilot)[1]["inputs_sha256"] == before["inputs_sha256"]
    content["depends"]["posts"] = "0" * 64
    path.write_text(json.dumps(content))
    assert report(pilot)[1]["inputs_sha256"] != before["inputs_sha256"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder / "work"), "last state"),
        (lambda folder: (run_folder(folder) / "log.csv").unlink(), "log.csv does not say"),
        (lambda folder: (run_folder(folder) / "log.csv").write_text("step\n1\n"), "log.csv does not say"),
        (lambda folder: shutil.rmtree(folder / "build" / "records"), "no record of its training"),
        (lambda folder: (folder / "build" / "delta-lokr.safetensors").write_bytes(b"other"), "is not what the train"),
        (lambda folder: (folder / "dvc.lock").unlink(), "dvc.lock"),
        (lambda folder: (folder / "build" / "journal.parquet").unlink(), "journal.parquet"),
    ],
)
def test_what_is_no_finished_pilot_is_refused_in_a_sentence(pilot, damage, sentence):
    damage(pilot)
    done, _ = report(pilot)
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output, done.output


@pytest.mark.slow
def test_a_trained_recipe_is_reported_with_three_steps_computed_again(tmp_path):
    """The stage itself, its record, and the replays in processes of their own."""
    folder = tiny_training.write(tmp_path, 24, {"execution": {"ranks": 1, "save_every": 2}})
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("root: ..", f"root: {os.path.relpath(ROOT, folder)}"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "build" / "code").mkdir()
    (folder / "build" / "code" / "train.json").write_text(rebuild_factory.CODE["train"])
    variables = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, str(ROOT / "stages" / "train.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    declared = rebuild_factory.declared(folder, "train")

    def places(paths):
        found = {path: rebuild_factory.hashed(folder / path) for path in paths}
        return [
            {"path": path, "hash": "md5"} | {key: each[key] for key in ("md5", "size", "nfiles") if key in each}
            for path, each in found.items()
        ]

    stage = {"cmd": declared["cmd"], "deps": places(declared["deps"]), "outs": places(declared["outs"])}
    stage["params"] = {"params.yaml": declared["params"]}
    rebuild_factory.dump(folder / "dvc.lock", {"schema": "2.0", "stages": {"train": stage}})
    command = [sys.executable, str(ROOT / "src" / "kohaku_delta"), "pilot-report"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "build" / "pilot.json").read_text())
    assert set(found["replayed"].values()) == {"equal"} and len(found["replayed"]) == 3
    assert found["seconds_per_step"] > 0 and found["peak_mib"] > 100
    assert done.stdout.count("bit for bit") == 3
