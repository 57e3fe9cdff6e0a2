"""Runs under work/: finished or unfinished, none is given up for another, and nobody is told to delete one."""

import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import tiny_training
from kohaku_delta.cli.main import main
from kohaku_delta.errors import UserError
from kohaku_delta.training import checkpointing, run_folders

PR_CAPBSET_DROP = 24  # linux/prctl.h
OLD = {"train.seed": "1337", "base": "0" * 64, "code of src/a.py": "1" * 64}
NEW = OLD | {"train.seed": "1338"}


@pytest.fixture(autouse=True)
def no_experiment(monkeypatch):
    for name in ("CI", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def make_run(work, depends, done, steps=58):
    """A run's folder with the (empty) state after `done` steps."""
    folder = run_folders.run_folder(work, depends, steps, 0)
    run_folders.state_path(folder, done).mkdir()
    return folder


def names(work):
    return sorted(path.name for path in work.iterdir())


def test_a_finished_run_stays_in_its_folder_and_blocks_nothing(tmp_path):
    finished = make_run(tmp_path, OLD, 58)
    new = run_folders.run_folder(tmp_path, NEW, 58, 0)
    assert new != finished and run_folders.saved_steps(finished) == [58]


def test_an_unfinished_run_is_taken_up_whatever_else_is_unfinished(tmp_path, monkeypatch):
    first = make_run(tmp_path, OLD, 12)
    monkeypatch.setenv("CI", "true")
    make_run(tmp_path, NEW, 20)
    monkeypatch.delenv("CI")
    assert run_folders.run_folder(tmp_path, OLD, 58, 0) == first


def test_an_unfinished_run_with_other_inputs_is_refused_by_what_differs_and_the_command_named_sets_it_aside(
    tmp_path, capsys
):
    folder = make_run(tmp_path / "work", OLD, 12)
    other = OLD | {"train.seed": "1338", "base": "2" * 64, "code of src/a.py": "3" * 64}
    with pytest.raises(UserError) as refused:
        run_folders.run_folder(tmp_path / "work", other, 58, 0)
    message = refused.value.message
    assert f"{folder} holds an unfinished training, 12 of 58 steps" in message
    assert "base, train.seed: 1337 → 1338, code of src/a.py." in message
    assert not re.search(r"delete|remove|\brm\b", message, re.IGNORECASE)
    command = shlex.split(re.search("`kohaku-delta (.*?)`", message)[1])

    done = CliRunner().invoke(main, [*command])
    assert done.exit_code == 0, done.output
    assert f"{folder} (12 of 58 steps) → {folder}.set-aside" in done.output and "dvc repro" in done.output
    assert names(tmp_path / "work") == [f"{folder.name}.set-aside"]
    make_run(tmp_path / "work", other, 58)

    assert run_folders.run_folder(tmp_path / "work", OLD, 58, 1) == run_folders.set_aside_path(folder)
    assert run_folders.run_folder(tmp_path / "work", OLD, 58, 0) == folder, "it takes itself up again"
    assert "12 of 58 steps are done" in capsys.readouterr().err
    assert run_folders.saved_steps(folder) == [12]


def test_a_run_without_a_saved_step_blocks_nothing(tmp_path):
    run_folders.run_folder(tmp_path, OLD, 58, 0)
    run_folders.run_folder(tmp_path, NEW, 58, 0)
    assert (
        CliRunner()
        .invoke(main, ["set-aside", "--work", tmp_path])
        .output.endswith("holds no unfinished training; nothing was moved.\n")
    )


@pytest.mark.parametrize("variable, value", [("DVC_EXP_NAME", "mined-pita"), ("CI", "true"), ("CI", "1")])
def test_experiments_and_ci_begin_beside_an_unfinished_run_and_say_that_it_is_kept(
    tmp_path, monkeypatch, capsys, variable, value
):
    folder = make_run(tmp_path, OLD, 12)
    monkeypatch.setenv(variable, value)
    assert run_folders.run_folder(tmp_path, NEW, 58, 0) != folder
    said = capsys.readouterr().err
    assert f"{folder} holds an unfinished training, 12 of 58 steps" in said and "train.seed: 1337 → 1338" in said
    assert "It is kept there" in said and run_folders.saved_steps(folder) == [12]


def test_ci_switched_off_is_no_ci(tmp_path, monkeypatch):
    make_run(tmp_path, OLD, 12)
    monkeypatch.setenv("CI", "false")
    with pytest.raises(UserError, match="unfinished"):
        run_folders.run_folder(tmp_path, NEW, 58, 0)


def test_a_training_that_is_under_way_is_not_set_aside_nor_is_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    folders = [make_run(tmp_path, depends, 12) for depends in (OLD, NEW)]
    before = names(tmp_path)
    with open(folders[0] / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = CliRunner().invoke(main, ["set-aside", "--work", tmp_path])
    assert done.exit_code == 1 and f"Another training uses {folders[0]}" in done.output
    assert names(tmp_path) == before
    assert CliRunner().invoke(main, ["set-aside", "--work", tmp_path]).exit_code == 0
    assert all(name.endswith(".set-aside") for name in names(tmp_path))


def test_a_run_set_aside_twice_under_one_name_is_refused(tmp_path):
    folder = make_run(tmp_path, OLD, 12)
    shutil.copytree(folder, run_folders.set_aside_path(folder))
    done = CliRunner().invoke(main, ["set-aside", "--work", tmp_path])
    assert done.exit_code == 1 and "exists already. Move it to another folder" in done.output
    assert len(names(tmp_path)) == 2


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


HOSTILE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "not text": lambda path: path.write_bytes(bytes(range(256))),
    "deep": lambda path: path.write_text("[" * 500_000),
    "huge": lambda path: os.truncate(path, 5 << 30),
    "a list": lambda path: path.write_text("[1]"),
    "numbers": lambda path: path.write_text('{"steps": 58, "depends": {"a": 1}}'),
    "no steps": lambda path: path.write_text('{"depends": {}}'),
    "a text of steps": lambda path: path.write_text('{"steps": "58", "depends": {}}'),
    "infinite steps": lambda path: path.write_text('{"steps": 1e999, "depends": {}}'),
    "steps of none": lambda path: path.write_text('{"steps": 0, "depends": {}}'),
    "another key": lambda path: path.write_text('{"steps": 58, "depends": {}, "\\u001b[2J": 1}'),
    "control characters": lambda path: path.write_text(
        json.dumps({"steps": 58, "depends": {"\x1b[2Jname": "\x1b]0;title\x07", "x" * 9000: "y"}})
    ),
    "a folder": folder_instead,
    "a pipe": fifo,
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_run_whose_inputs_cannot_be_read_is_kept_and_said_in_a_printable_sentence(tmp_path, how):
    folder = make_run(tmp_path, OLD, 12)
    HOSTILE[how](folder / run_folders.DEPENDS)
    with pytest.raises(UserError) as refused:
        run_folders.run_folder(tmp_path, NEW, 58, 0)
    message = refused.value.message
    assert message.isprintable() and len(message) < 1500 and "set-aside" in message and str(folder) in message
    done = CliRunner().invoke(main, ["set-aside", "--work", tmp_path])
    assert done.exit_code == 0 and done.output.replace("\n", "").isprintable(), done.output
    assert names(tmp_path) == [f"{folder.name}.set-aside"]


@pytest.mark.parametrize("how", [how for how in HOSTILE if how not in ("a folder", "a pipe")])
def test_a_damaged_depends_json_of_the_own_run_is_written_again(tmp_path, how):
    folder = make_run(tmp_path, OLD, 12)
    content = (folder / run_folders.DEPENDS).read_bytes()
    HOSTILE[how](folder / run_folders.DEPENDS)
    assert run_folders.run_folder(tmp_path, OLD, 58, 0) == folder
    assert (folder / run_folders.DEPENDS).read_bytes() == content and run_folders.saved_steps(folder) == [12]


def test_folders_that_are_no_runs_are_left_alone(tmp_path):
    for name in ("lost+found", "bench", "0123", f"{'a' * 16}.old"):
        (tmp_path / name / "step-00000012").mkdir(parents=True)
    (tmp_path / ("b" * 16)).write_text("a file")
    run_folders.run_folder(tmp_path, NEW, 58, 0)
    assert CliRunner().invoke(main, ["set-aside", "--work", tmp_path]).output.count("\n") == 1


def drop_root() -> None:
    """Drop root's capabilities to read and write everywhere; other users do not have them."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability)


def test_a_run_without_permissions_is_reported_in_one_sentence(tmp_path):
    folder = make_run(tmp_path, OLD, 12)
    folder.chmod(0)
    command = [sys.executable, "-m", "kohaku_delta", "set-aside", "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=drop_root)
    folder.chmod(0o755)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr and str(folder) in done.stderr


@pytest.mark.slow
def test_an_interrupted_training_goes_on_after_being_set_aside_damaged_and_killed_in_a_save(tmp_path):
    folder = tiny_training.write(tmp_path / "training", 16, keep_states=100)
    process = subprocess.Popen(
        tiny_training.command(1), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.glob("work/*/step-00000002")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [run] = folder.glob("work/*")
    for step in run_folders.saved_steps(run)[2:]:
        shutil.rmtree(run_folders.state_path(run, step))
    (run / ".step-00000009.0.aside").mkdir()
    (run / ".step-00000009.0.aside" / "state.safetensors").write_text("half")
    params = (folder / "params.yaml").read_text()

    (folder / "params.yaml").write_text(params.replace("seed: 1337", "seed: 1338"))
    done = tiny_training.run(folder)
    assert done.returncode == 1 and "train.seed: 1337 → 1338" in done.stderr and done.stderr.count("\n") == 1
    assert CliRunner().invoke(main, ["set-aside", str(folder)]).exit_code == 0
    (folder / "params.yaml").write_text(params)
    newest = max(run_folders.saved_steps(run.with_name(f"{run.name}.set-aside")))
    state = run.with_name(f"{run.name}.set-aside") / f"step-{newest:08d}" / checkpointing.STATE
    state.write_bytes(state.read_bytes()[:-1] + b"\1")

    resumed = tiny_training.run(folder)
    assert resumed.returncode == 0, resumed.stderr
    assert f"is resumed as work/{run.name}: {newest} of 4 steps are done" in resumed.stderr
    assert f"It is kept as work/{run.name}/step-{newest:08d}.damaged" in resumed.stderr
    assert not list(run.glob(".*")), "what the killed save left was cleared"
    again = tiny_training.write(tmp_path / "again", 16)
    assert tiny_training.run(again).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(again)
