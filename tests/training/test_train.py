"""A training of a few steps: the same bytes with other numbers of ranks, after kills, in other folders; nothing
half-written.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import tiny_training
from kohaku_delta.formats import parquet


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training of two or three steps by one rank: (folder, completed process)."""
    folder = tiny_training.write(tmp_path_factory.mktemp("training"), 16)
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def copy_inputs(trained, tmp_path):
    """A copy of the training in another folder, before its first step."""
    shutil.copytree(
        trained[0],
        tmp_path / "elsewhere",
        ignore=lambda folder, names: [name for name in names if name in (*tiny_training.OUTS, "milestones", "work")],
    )
    return tmp_path / "elsewhere"


def test_two_ranks_elsewhere_give_the_bytes_of_one_rank(trained, tmp_path):
    other = copy_inputs(trained, tmp_path)
    done = tiny_training.run(other, ranks=2)
    assert done.returncode == 0, done.stderr
    assert tiny_training.outs(other) == tiny_training.outs(trained[0])
    assert done.stdout.count("train: ") == 1


def test_killed_training_resumes_to_the_same_bytes(trained, tmp_path):
    other = copy_inputs(trained, tmp_path)
    process = subprocess.Popen(
        tiny_training.command(1), cwd=other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(other.glob("work/*/step-00000001")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (other / "build" / "delta-lokr.safetensors").exists()
    assert tiny_training.run(other).returncode == 0
    assert tiny_training.outs(other) == tiny_training.outs(trained[0])


@pytest.mark.ci
def test_images_edited_during_the_training_are_refused_and_the_training_is_kept(trained, tmp_path):
    other = copy_inputs(trained, tmp_path)
    listed = other / "build" / "inputs.json"
    content = json.loads(listed.read_text())
    for entry in content["inputs"]["tars"]:
        (other / "tars").mkdir(exist_ok=True)
        entry["path"] = f"../tars/{Path(shutil.copy(listed.parent / entry['path'], other / 'tars')).name}"
    listed.write_text(json.dumps(content))
    last = other / "tars" / "data-2000.tar"
    whole = last.read_bytes()
    process = subprocess.Popen(
        tiny_training.command(1), cwd=other, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(other.glob("work/*/step-00000001")):
        time.sleep(0.02)
    last.write_bytes(whole[:-1] + b"x")
    output = process.communicate()[1]
    assert (
        process.returncode == 1
        and "data-2000.tar was edited or replaced" in output
        and not any((other / "build" / name).exists() for name in tiny_training.OUTS)
    ), output
    last.write_bytes(whole)
    steps = len(next(iter(other.glob("work/*/log.csv"))).read_text().splitlines())
    assert tiny_training.run(other).returncode == 0 and tiny_training.outs(other) == tiny_training.outs(trained[0])
    assert len(next(iter(other.glob("work/*/log.csv"))).read_text().splitlines()) == steps, "no step was computed twice"


def test_the_lokr_moved_everywhere_but_in_text_encoder_1s_last_layer(trained):
    tensors = load_file(trained[0] / "build" / "delta-lokr.safetensors")
    for name, array in tensors.items():
        if name.endswith(".lokr_w2"):
            assert (array == 0).all() == name.startswith("lora_te1_text_model_encoder_layers_2_"), name


def test_the_journal_has_one_chained_row_per_step(trained):
    rows = tiny_training.journal(trained[0]).to_pylist()
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len({row["chain"] for row in rows}) == len({row["weights"] for row in rows}) == len(rows)
    schedule = parquet.read(trained[0] / "build" / "schedule.parquet").to_pylist()
    assert [len(row["losses"]) for row in rows] == [
        sum(row["step"] == step for row in schedule) for step in range(len(rows))
    ]


def test_ranks_that_do_not_divide_the_lanes_are_refused_in_one_line(trained, tmp_path):
    other = copy_inputs(trained, tmp_path)
    done = tiny_training.run(other, ranks=3)
    assert done.returncode == 1 and "3 ranks cannot share 4 lanes" in done.stderr and "Traceback" not in done.stderr
    assert not any((other / "build" / name).exists() for name in tiny_training.OUTS)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_the_current_step_and_is_resumed(trained, tmp_path, ranks):
    other = copy_inputs(trained, tmp_path)
    process = subprocess.Popen(
        tiny_training.command(ranks), cwd=other, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(other.glob("work/*/step-00000001")):
        time.sleep(0.02)
    process.terminate()
    _, output = process.communicate()
    if process.returncode:
        assert "Traceback" not in output and "run the stage again" in output.lower(), output
    assert tiny_training.run(other).returncode == 0
    assert tiny_training.outs(other) == tiny_training.outs(trained[0])
