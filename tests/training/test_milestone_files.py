"""The milestones of a training: their steps, their weights, and what happens if a file of the work folder is lost. And
the event files for TensorBoard, read here by the format's definition.
"""

import csv
import shutil
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny_training
from kohaku_delta.formats import hashing, safetensors_io
from tiny_training import outs, run

EVERY, SAVED = 2, 3  # neither divides the other


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Some six steps, with event files."""
    folder = tiny_training.write(
        tmp_path_factory.mktemp("training"),
        40,
        milestone_every=EVERY,
        save_every=SAVED,
        keep_states=1,
        tensorboard=True,
    )
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    """A copy with its work folder, without outputs."""
    shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "build" / "milestones")
    for name in tiny_training.OUTS:
        (tmp_path / "copy" / "build" / name).unlink()
    return tmp_path / "copy"


def steps(folder) -> int:
    return len(tiny_training.journal(folder))


def names(folder) -> list[str]:
    return [f"delta-lokr-step{step:08d}.safetensors" for step in range(EVERY, steps(folder) + 1, EVERY)]


def work(folder):
    (run_folder,) = (path for path in (folder / "work").iterdir() if path.is_dir())
    return run_folder


@pytest.mark.ci
def test_milestones_come_at_their_own_steps_whatever_save_every_is(trained):
    assert steps(trained) >= 5 and len(names(trained)) >= 2
    assert sorted(path.name for path in (trained / "build" / "milestones").iterdir()) == names(trained)
    kept = {f"step-{step:08d}" for step in {*range(EVERY, steps(trained) + 1, EVERY), steps(trained)}}
    assert {path.name for path in work(trained).glob("step-*")} == kept


@pytest.mark.ci
def test_a_milestone_holds_the_weights_of_its_saved_state(trained):
    for name in names(trained):
        lokr = load_file(trained / "build" / "milestones" / name)
        state = load_file(work(trained) / f"step-{name[15:23]}" / "state.safetensors")
        weights = {key[8:]: array for key, array in state.items() if key.startswith("weights/")}
        assert weights.keys() == {key for key in lokr if not key.endswith(".alpha")}
        assert all((lokr[key] == array.astype(np.float16)).all() for key, array in weights.items())
    final = load_file(trained / "build" / "delta-lokr.safetensors")
    assert any(
        (final[key] != array).any() for key, array in load_file(trained / "build" / "milestones" / name).items()
    ) == (steps(trained) % EVERY > 0)


@pytest.mark.ci
def test_a_milestone_that_is_lost_or_damaged_in_work_is_written_again_from_its_state(trained, finished):
    first, second, *_ = names(trained)
    (work(finished) / first).unlink()
    damaged = bytearray((work(finished) / second).read_bytes())
    damaged[-1] ^= 1
    (work(finished) / second).write_bytes(damaged)
    done = run(finished)
    assert done.returncode == 0, done.stderr
    assert outs(finished) == outs(trained)


@pytest.mark.slow
def test_a_milestone_that_is_lost_with_its_state_is_named_and_can_be_put_back(trained, finished, tmp_path):
    first = names(trained)[0]
    state = work(finished) / f"step-{EVERY:08d}"
    (work(finished) / first).unlink()
    state.rename(tmp_path / "backup")
    done = run(finished)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{first} is missing or damaged, and there is no saved state after 2 steps" in done.stderr
    assert not any((finished / "build" / name).exists() for name in (*tiny_training.OUTS, "milestones"))
    (tmp_path / "backup").rename(state)
    assert run(finished).returncode == 0 and outs(finished) == outs(trained)


@pytest.mark.slow
def test_a_training_shorter_than_its_first_milestone_has_an_empty_folder(tmp_path):
    folder = tiny_training.write(tmp_path / "short", 16, milestone_every=1000)
    assert run(folder).returncode == 0
    assert list((folder / "build" / "milestones").iterdir()) == []
    digest = hashing.digest_path(folder / "build" / "milestones")
    assert (digest.md5, digest.bytes, digest.files) == ("d751713988987e9331980363e24189ce.dir", 0, {}), (
        "as in DVC's lock"
    )


def fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """The (number, value) pairs of a protobuf message."""
    found, place = [], 0

    def varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte, place = data[place], place + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            found.append((key >> 3, varint()))
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        found.append((key >> 3, data[place : place + length]))
        place += length
    return found


def read_events(path) -> list[tuple[int, dict[str, float], bool]]:
    """(step, values by tag, whether it begins a session) of each whole event of a file. A record is its length as
    uint64, 4 bytes, the event, 4 bytes.
    """
    data, place, events = path.read_bytes(), 0, []
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = dict(fields(data[place + 12 : place + 12 + length]))
        place += 16 + length
        if place > len(data):
            break  # cut off by a kill
        values = {}
        for _, value in fields(event.get(5, b"")):  # Summary.value: tag 1, simple_value 2
            one = dict(fields(value))
            values[one[1].decode()] = struct.unpack("<f", one[2])[0]
        begins = dict(fields(event.get(7, b""))).get(1) == 1  # SessionLog.START
        events.append((event.get(2, 0), values, begins))
    return events


def as_tensorboard_shows(folder) -> dict[str, dict[int, float]]:
    """Values by tag and step: a session's start discards what earlier files have from its step on."""
    shown: dict[str, dict[int, float]] = {}
    for path in sorted((work(folder) / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for step, values, begins in read_events(path):
            if begins:
                shown = {tag: {at: value for at, value in each.items() if at < step} for tag, each in shown.items()}
            for tag, value in values.items():
                assert step not in shown.setdefault(tag, {})
                shown[tag][step] = value
    return shown


def require_events(folder) -> None:
    with open(folder / "build" / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    shown = as_tensorboard_shows(folder)
    columns = {
        "loss/current": "loss",
        "gradient/norm": "gradient_norm",
        "lr/unet": "learning_rate_unet",
        "lr/textencoder": "learning_rate_text",
    }
    for tag, column in columns.items():
        expected = {int(row["step"]) + 1: float(np.float32(float(row[column]))) for row in rows}
        assert shown[tag] == expected, tag
    losses = [float(row["loss"]) for row in rows]
    means = {step + 1: np.mean(losses[: step + 1]) for step in range(len(losses))}
    assert shown["loss/average"] == pytest.approx(means)
    assert all(value > 0 for tag in ("speed/images_per_second", "memory/peak_mib") for value in shown[tag].values())
    assert shown.keys() == {*columns, "loss/average", "gradient/scale", "speed/images_per_second", "memory/peak_mib"}


@pytest.mark.ci
def test_event_files_have_what_the_curves_have(trained):
    require_events(trained)


@pytest.mark.slow
def test_event_files_are_whole_after_a_kill_and_a_resume(trained, finished):
    """Killed after a step that was logged and not saved: the folder has later events than states, the last one cut."""
    for state in work(finished).glob("step-*"):
        if state.name > "step-00000002":
            shutil.rmtree(state)
    (events,) = (work(finished) / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-7])
    time.sleep(1.1)  # the file's name has the second in which it was begun
    assert run(finished).returncode == 0
    assert len(list((work(finished) / "tensorboard").iterdir())) == 2
    require_events(finished)
    assert outs(finished) == outs(trained)


@pytest.mark.slow
def test_event_files_change_no_bit(trained, tmp_path):
    other = tiny_training.write(tmp_path / "other", 40, milestone_every=EVERY, save_every=SAVED, keep_states=1)
    assert run(other).returncode == 0
    assert outs(other) == outs(trained) and not list(other.glob("work/*/tensorboard"))


@pytest.mark.ci
def test_a_lokr_file_names_its_steps(trained):
    with safetensors_io.open_file(trained / "build" / "milestones" / names(trained)[0]) as file:
        assert file.metadata["ss_steps"] == str(EVERY)
