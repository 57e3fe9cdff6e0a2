"""On a CUDA card: twenty steps in fp16, two lanes on one card, are the same bytes twice and after a kill. Never run
without a card.
"""

import os
import signal
import subprocess
import time

import pytest
import torch

import tiny_training

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card here")]
STEPS = 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return once(tmp_path_factory.mktemp("card"))


def once(folder, kill: bool = False):
    sections = {"schedule": {"batch_size": 2, "micro_batches": 4, "lanes": 2}}
    tiny_training.write(
        folder, 8 * STEPS, sections, device="cuda", precision="float16", weights="float16", gradient_checkpointing=True
    )
    if kill:
        process = subprocess.Popen(tiny_training.command(1), cwd=folder, start_new_session=True)
        while not list(folder.glob("work/*/step-00000005")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_twenty_steps_on_a_card_are_the_same_bytes_twice(trained, tmp_path):
    assert tiny_training.journal(trained).num_rows >= STEPS
    assert tiny_training.outs(once(tmp_path)) == tiny_training.outs(trained)


def test_twenty_steps_on_a_card_survive_a_kill_bit_for_bit(trained, tmp_path):
    assert tiny_training.outs(once(tmp_path, kill=True)) == tiny_training.outs(trained)
