"""A state that is damaged in any way is never used, never silently skipped and never thrown away."""

import pytest
import torch

from kohaku_delta.errors import UserError
from kohaku_delta.training import checkpointing
from tiny_states import HEADER, damage, save

DAMAGES = {
    "a flipped bit": lambda folder: damage(folder, 3),
    "no state": lambda folder: (checkpointing.state_path(folder, 3) / checkpointing.STATE).unlink(),
    "no journal": lambda folder: (checkpointing.state_path(folder, 3) / checkpointing.JOURNAL).unlink(),
    "an empty journal": lambda folder: (checkpointing.state_path(folder, 3) / checkpointing.JOURNAL).write_bytes(b""),
    "the state of another step": lambda folder: checkpointing.state_path(folder, 2).rename(folder / "step-00000004"),
    "a cut state": lambda folder: (checkpointing.state_path(folder, 3) / checkpointing.STATE).write_bytes(b"\0" * 7),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_state_is_said_and_kept_and_the_one_before_is_used(tmp_path, capsys, how):
    kept = {steps: save(tmp_path, steps) for steps in (1, 2, 3)}
    DAMAGES[how](tmp_path)
    *_, newest = checkpointing.saved_steps(tmp_path)
    done, state = checkpointing.load_newest_state(tmp_path, HEADER)
    assert done == (2 if newest == 3 else 3) and state.journal.rows[-1]["step"] == done - 1
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in kept[done].items())
    said = capsys.readouterr().err
    assert f"{tmp_path}/step-0000000{newest}" in said and "an older state is used instead" in said
    assert (tmp_path / f"step-0000000{newest}.damaged").is_dir() and newest not in checkpointing.saved_steps(tmp_path)


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
    assert checkpointing.saved_steps(tmp_path) == [1, 2], "nothing was renamed"


def test_without_a_state_training_begins_at_step_0(tmp_path):
    assert checkpointing.load_newest_state(tmp_path / "new", HEADER) == (0, None)
