"""Ranks without a shared folder start from one state, the newest, or none starts; a rank that differs is named."""

import json
import os
import subprocess
import sys

import torch

from kohaku_delta.training import checkpointing, journal, tensor_fingerprints

HEADER = {"base": "b", "parameters": {"train.seed": 1}}
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
        tensors, scaler, rows = held
        combined = tensor_fingerprints.combine(tensor_fingerprints.fingerprints(tensors))
        print(steps, sorted(tensors), combined, scaler, rows.rows[-1]["chain"], rows.header["base"])
    else:
        print(steps)
except UserError as refusal:
    print("refused:", refusal.message)
dist.destroy_process_group()
"""


def save(folder, steps):
    """Save a state of two weights after `steps` steps; returns its tensors."""
    tensors = {
        "weights/a": torch.full((5000,), steps, dtype=torch.float16),
        "weights/b": torch.arange(7.0),
        "optimizer/a.state1": torch.full((5000,), 3, dtype=torch.uint8),
    }
    rows = journal.Journal(HEADER)
    for step in range(steps):
        current = tensors | {"weights/a": torch.full((5000,), step + 1, dtype=torch.float16)}
        weights = tensor_fingerprints.fingerprints(checkpointing.select_prefix(current, "weights/"))
        optimizer = tensor_fingerprints.fingerprints(checkpointing.select_prefix(current, "optimizer/"))
        rows.append(
            {
                "step": step, "visits": "v", "losses": [0.1], "lanes": [2**64 - 1], "gradient_norm": 1.0,
                "learning_rate_unet": 0.0, "learning_rate_text": 0.0, "scale": 8.0,
                "weights": tensor_fingerprints.combine(weights), "optimizer": tensor_fingerprints.combine(optimizer),
                "tensors": tensor_fingerprints.short_fingerprints(weights),
            }
        )  # fmt: skip
    checkpointing.save(folder, steps, tensors, (65536.0, 17), rows, 9, 1000)
    return tensors


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
    assert first == second and first.startswith(f"3 {sorted(tensors)} {combined} (65536.0, 17) ")
    assert first.endswith(" b")


def test_a_damaged_newest_state_stops_every_rank_and_is_named_on_its_machine(tmp_path):
    save(tmp_path / "0", 2)
    save(tmp_path / "1", 3)
    file = checkpointing.state_path(tmp_path / "1", 3) / checkpointing.STATE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    first, second = load_on_both(tmp_path)
    assert first == "refused: Rank 1 has a state after step 2 that cannot be loaded; it says why, on its own machine."
    assert second.startswith(f"refused: {file} is not what training saved") and "Delete" in second


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
