"""A state that is damaged in any way is never used, never silently skipped and never thrown away."""

import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from kohaku_delta.errors import UserError
from kohaku_delta.training import checkpointing, journal, run_folders
from tiny_states import HEADER, damage, save


def journal_file(folder: Path, steps: int, first: int) -> Path:
    """The file of the rows from step `first` on, in the journal of the state after `steps` steps."""
    return run_folders.state_path(folder, steps) / checkpointing.JOURNAL / f"{first:08d}.parquet"


def take_from_another_training(folder: Path) -> None:
    save(folder / "other", 3, journal.Journal(HEADER | {"base": "c"}), milestone=2)
    shutil.copy(journal_file(folder / "other", 3, 0), journal_file(folder, 3, 0))
    shutil.rmtree(folder / "other")


DAMAGES = {
    "a flipped bit": lambda folder: damage(folder, 3),
    "no state": lambda folder: (run_folders.state_path(folder, 3) / checkpointing.STATE).unlink(),
    "no journal": lambda folder: shutil.rmtree(run_folders.state_path(folder, 3) / checkpointing.JOURNAL),
    "an empty journal": lambda folder: journal_file(folder, 3, 0).write_bytes(b""),
    "a part of the journal missing": lambda folder: journal_file(folder, 3, 0).unlink(),
    "the journal's end missing": lambda folder: journal_file(folder, 3, 2).unlink(),
    "a file too many": lambda folder: shutil.copy(journal_file(folder, 3, 2), journal_file(folder, 3, 3)),
    "a part of another journal": take_from_another_training,
    "the state of another step": lambda folder: run_folders.state_path(folder, 2).rename(folder / "step-00000004"),
    "a cut state": lambda folder: (run_folders.state_path(folder, 3) / checkpointing.STATE).write_bytes(b"\0" * 7),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_state_is_said_and_kept_and_the_one_before_is_used(tmp_path, capsys, how):
    kept = {steps: save(tmp_path, steps, milestone=2) for steps in (1, 2, 3)}
    DAMAGES[how](tmp_path)
    *_, newest = run_folders.saved_steps(tmp_path)
    done, state = checkpointing.load_newest_state(tmp_path, HEADER)
    assert done == (2 if newest == 3 else 3) and state.journal.rows[-1]["step"] == done - 1
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in kept[done].items())
    said = capsys.readouterr().err
    assert f"{tmp_path}/step-0000000{newest}" in said and "an older state is used instead" in said
    assert (tmp_path / f"step-0000000{newest}.damaged").is_dir() and newest not in run_folders.saved_steps(tmp_path)


def test_a_step_that_is_damaged_twice_is_kept_twice(tmp_path):
    save(tmp_path, 1)
    for _ in range(2):
        save(tmp_path, 2)
        damage(tmp_path, 2)
        assert checkpointing.load_newest_state(tmp_path, HEADER)[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000001",
        "step-00000002.damaged",
        "step-00000002.damaged-2",
    }


def test_if_no_state_is_sound_training_does_not_begin_at_step_0_by_itself(tmp_path):
    for steps in (1, 2):
        save(tmp_path, steps)
        damage(tmp_path, steps)
    for _ in range(2):
        with pytest.raises(UserError, match=r"No saved state in .* can be used: .*step-00000002.*--work"):
            checkpointing.load_newest_state(tmp_path, HEADER)
    assert run_folders.saved_steps(tmp_path) == [1, 2], "nothing was renamed"


def test_without_a_state_training_begins_at_step_0(tmp_path):
    assert checkpointing.load_newest_state(tmp_path / "new", HEADER) == (0, None)


def test_the_states_between_two_milestones_share_the_rows_before_them_and_each_is_whole(tmp_path):
    rows = journal.Journal(HEADER)
    for steps in range(1, 10):
        save(tmp_path, steps, rows, milestone=4)
        folder = run_folders.state_path(tmp_path, steps) / checkpointing.JOURNAL
        assert (
            journal.read_journal(folder).rows == rows.rows == pq.read_table(folder, schema=journal.SCHEMA).to_pylist()
        )
        assert checkpointing.load(tmp_path, steps, HEADER).journal.rows == rows.rows
    shared = {steps: journal_file(tmp_path, steps, 0).stat().st_ino for steps in range(1, 10)}
    assert shared[5] == shared[6] == shared[7]
    assert len({shared[steps] for steps in (1, 2, 3, 4, 5, 8, 9)}) == 7, "a milestone's file is its own"
    assert [pq.read_metadata(journal_file(tmp_path, 7, first)).num_rows for first in (0, 4)] == [4, 3]


def test_a_hidden_file_that_another_program_left_costs_no_state(tmp_path):
    rows = journal.Journal(HEADER)
    for steps in (1, 2):
        save(tmp_path, steps, rows, milestone=4)
    folder = checkpointing.state_path(tmp_path, 2)
    for name in (".DS_Store", ".nfs0000000000000001", ".a", ".b"):
        (folder / name).write_text("")
        (folder / checkpointing.JOURNAL / name).write_text("")
    assert checkpointing.load_newest_state(tmp_path, HEADER)[0] == 2


def _refuse_links(*_):
    raise PermissionError("Operation not permitted")


@pytest.mark.parametrize("how", ["resumed", "copied", "milestone deleted", "without links"])
def test_the_files_of_a_state_do_not_depend_on_how_it_was_reached(tmp_path, monkeypatch, how):
    folder, uninterrupted = tmp_path / "interrupted", journal.Journal(HEADER)
    for steps in (3, 4, 5, 6, 7):
        save(tmp_path / "uninterrupted", steps, uninterrupted, milestone=4)
    rows = journal.Journal(HEADER)
    for steps in (3, 4, 5, 6):
        save(folder, steps, rows, milestone=4)
    if how == "copied":
        shutil.copytree(folder, tmp_path / "copy")
        folder = tmp_path / "copy"
    if how == "milestone deleted":
        shutil.rmtree(run_folders.state_path(folder, 4))
    if how == "without links":
        monkeypatch.setattr(os, "link", _refuse_links)
    done, state = checkpointing.load_newest_state(folder, HEADER)
    assert done == 6
    save(folder, 7, state.journal, milestone=4)
    for first in (0, 4):
        expected = journal_file(tmp_path / "uninterrupted", 7, first).read_bytes()
        assert journal_file(folder, 7, first).read_bytes() == expected


def test_damage_to_the_shared_rows_costs_the_steps_since_the_milestone(tmp_path):
    rows = journal.Journal(HEADER)
    for steps in (4, 5, 6):
        save(tmp_path, steps, rows, milestone=4)
    with open(journal_file(tmp_path, 6, 0), "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    assert checkpointing.load_newest_state(tmp_path, HEADER)[0] == 4
    assert run_folders.saved_steps(tmp_path) == [4]
