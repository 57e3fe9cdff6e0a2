"""Ranks without a shared folder start from one state, the newest, or none starts; a rank that differs is named."""

import json
import os
import subprocess
import sys

import pytest

from kohaku_delta.training import run_folders, tensor_fingerprints
from tiny_states import HEADER, damage, save

RANK = """
import json, sys
import torch.distributed as dist
from pathlib import Path
from kohaku_delta.errors import UserError
from kohaku_delta.training import distributed_state, tensor_fingerprints
rank, folder, depends = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder.parent}/store", rank=rank, world_size=2)
try:
    distributed_state.require_same_run(depends, 2, "cpu")
    steps, held = distributed_state.load_newest_state(folder, json.loads(sys.argv[4]), 2, "cpu")
    if held:
        tensors, rows = held
        combined = tensor_fingerprints.combine(tensor_fingerprints.fingerprints(tensors))
        print(steps, sorted(tensors), combined, rows.rows[-1]["chain"], rows.header["base"])
    else:
        print(steps)
except UserError as refusal:
    print("refused:", refusal.message)
dist.destroy_process_group()
"""


def run_ranks(code, *arguments):
    """The outputs of two ranks; arguments: one pair per argument of the code after the rank.

    The code ends with destroy_process_group, as the trainer does: gloo's threads may abort a process that only exits.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *(str(pair[rank]) for pair in arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": "src"},
        )
        for rank in (0, 1)
    ]
    return [process.communicate(timeout=60)[0].strip() for process in ranks]


def load_on_both(tmp_path, depends=({}, {})):
    """The outputs of two ranks with their own folders, tmp_path/0 and tmp_path/1."""
    folders = (tmp_path / "0", tmp_path / "1")
    return run_ranks(RANK, folders, [json.dumps(inputs) for inputs in depends], [json.dumps(HEADER)] * 2)


def test_the_newest_state_of_any_machine_reaches_all_bit_for_bit(tmp_path):
    save(tmp_path / "0", 2)
    tensors = save(tmp_path / "1", 3)
    first, second = load_on_both(tmp_path)
    combined = tensor_fingerprints.combine(tensor_fingerprints.fingerprints(tensors))
    assert first == second and first.startswith(f"3 {sorted(tensors)} {combined} ")
    assert first.endswith(" b")


@pytest.mark.ci
@pytest.mark.parametrize("newest", [0, 1])
def test_a_damaged_newest_state_is_kept_by_its_machine_and_all_ranks_go_on_from_the_newest_sound_one(tmp_path, newest):
    other, own = tmp_path / str(1 - newest), tmp_path / str(newest)
    save(other, 1)
    tensors = save(own, 2)
    for steps in (3, 4):
        save(own, steps)
        damage(own, steps)
    first, second = load_on_both(tmp_path)
    combined = tensor_fingerprints.combine(tensor_fingerprints.fingerprints(tensors))
    assert first == second and first.startswith(f"2 {sorted(tensors)} {combined} ")
    assert sorted(path.name for path in own.iterdir()) == [
        "step-00000002",
        "step-00000003.damaged",
        "step-00000004.damaged",
    ]


def test_ranks_of_one_machine_set_a_damaged_state_aside_once(tmp_path):
    (tmp_path / "1").symlink_to(tmp_path / "0")
    for steps in (1, 2):
        save(tmp_path / "0", steps)
    damage(tmp_path / "0", 2)
    first, second = load_on_both(tmp_path)
    assert first == second and first.startswith("1 ")
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["step-00000001", "step-00000002.damaged"]


def test_if_every_state_is_damaged_all_ranks_stop_and_nothing_is_renamed(tmp_path):
    save(tmp_path / "1", 3)
    damage(tmp_path / "1", 3)
    first, second = load_on_both(tmp_path)
    assert first == "refused: No saved state of any machine can be used; rank 1 says why."
    assert second.startswith(f"refused: No saved state in {tmp_path / '1'} can be used: ")
    assert run_folders.saved_steps(tmp_path / "1") == [3]


def test_a_rank_with_other_inputs_names_them(tmp_path):
    first, second = load_on_both(tmp_path, ({"base": "1", "posts": "2"}, {"base": "1", "posts": "3", "code of x": "4"}))
    assert first.startswith("refused: The inputs of rank 1 are not those of rank 0")
    assert second.startswith("refused: Rank 1 cannot train with rank 0: code of x, posts differ.")


COMPARE = """
import sys
import torch.distributed as dist
from kohaku_delta.training.distributed_state import mismatching_ranks
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
print([mismatching_ranks(value, 2, "cpu") for value in (2**64 - 1, 2**64 - 1 - rank, rank << 40, rank << 63)])
dist.destroy_process_group()
"""


def test_a_rank_with_another_fingerprint_is_named_on_every_rank(tmp_path):
    assert run_ranks(COMPARE, [tmp_path / "store"] * 2) == ["[[], [1], [1], [1]]"] * 2
