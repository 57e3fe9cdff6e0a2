"""Twenty fp16 steps with two lanes on one GPU give the same bytes twice, after a kill, and on two GPUs. Skipped without
a GPU.
"""

import os
import signal
import subprocess
import time

import pytest
import torch

import tiny_training

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
STEPS = 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("gpu"))


def train(folder, kill: bool = False, ranks: int = 1):
    sections = {"schedule": {"batch_size": 2, "micro_batches": 4, "lanes": 2}}
    tiny_training.write(
        folder, 8 * STEPS, sections, device="cuda", precision="float16", weights="float16", gradient_checkpointing=True
    )
    if kill:
        process = subprocess.Popen(tiny_training.command(ranks), cwd=folder, start_new_session=True)
        while not list(folder.glob("work/*/step-00000005")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = tiny_training.run(folder, ranks)
    assert done.returncode == 0, done.stderr
    return folder


def test_twenty_steps_on_a_gpu_are_the_same_bytes_twice(trained, tmp_path):
    assert tiny_training.journal(trained).num_rows >= STEPS
    assert tiny_training.outs(train(tmp_path)) == tiny_training.outs(trained)


def test_twenty_steps_on_a_gpu_survive_a_kill_bit_for_bit(trained, tmp_path):
    assert tiny_training.outs(train(tmp_path, kill=True)) == tiny_training.outs(trained)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds one CUDA device; two ranks need two")
@pytest.mark.parametrize("kill", [False, True])
def test_twenty_steps_on_two_gpus_are_the_bytes_of_one(trained, tmp_path, kill):
    assert tiny_training.outs(train(tmp_path, kill, ranks=2)) == tiny_training.outs(trained)
