"""A training whose numbers go wrong stops, saved, and says where; one that only overflows goes on."""

import math

import pytest
import torch

import tiny_sdxl
import tiny_training
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.training import checkpointing, divergence, journal, optimizer, training_loop

NAN = float("nan")


class Nothing:
    """An adapter without tensors, and its optimizer."""

    def tensors(self):
        return {}

    def load(self, tensors, step):
        pass


HUGE = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def steps(folder) -> list[int]:
    return sorted(int(each.name.removeprefix("step-")) for each in folder.glob("work/*/step-*"))


def with_base(folder, change):
    """The training with a base that was changed."""
    tensors = tiny_sdxl.tensors(1)
    change(tensors)
    safetensors_io.save(
        folder / "build" / "delta-base.safetensors", {name: tensor.numpy() for name, tensor in tensors.items()}, None
    )
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_base_with_one_huge_weight_stops_the_first_step_and_names_posts_and_layer(tmp_path, ranks):
    def change(tensors):
        tensors[HUGE].view(-1)[0] = 60000

    folder = tiny_training.write(tmp_path / "training", 16, precision="float16", weights="float16")
    done = tiny_training.run(with_base(folder, change), ranks)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = {line for line in done.stderr.splitlines() if "Step 0" in line}
    assert "of 4 micro-batches is NaN or infinite" in line and "(posts " in line
    assert (
        "weights and latents are finite, the first layer whose output is not is unet.down_blocks.0.resnets.0." in line
    )
    assert not steps(folder) and not (folder / "build" / "delta-lokr.safetensors").exists()


@pytest.mark.ci
def test_a_base_that_holds_nan_is_named_as_the_first_thing_that_is_not_finite(tmp_path):
    def change(tensors):
        tensors[HUGE].view(-1)[0] = NAN

    done = tiny_training.run(with_base(tiny_training.write(tmp_path / "training", 8), change))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the base's weight unet.down_blocks.0.resnets.0.conv1.weight is not finite" in done.stderr


@pytest.mark.ci
def test_a_training_that_diverges_after_some_steps_keeps_the_last_good_one(tmp_path):
    folder = tiny_training.write(tmp_path / "training", 48, learning_rate_unet=30.0, save_every=100)
    done = tiny_training.run(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (last,) = steps(folder)
    assert f"Step {last}: " in done.stderr
    again = tiny_training.run(folder)
    assert again.returncode == 1 and f"Step {last}: " in again.stderr and steps(folder) == [last]


def test_three_losses_in_consecutive_steps_are_too_many_and_a_good_step_forgives_two():
    good, one, two = [0.1] * 4, [0.1, NAN, 0.1, 0.1], [math.inf, NAN, 0.1, 0.1]
    assert divergence.losses_diverged([[NAN] * 4])
    assert divergence.losses_diverged([good, two, one]) and divergence.losses_diverged([one, one, one])
    assert not divergence.losses_diverged([two, good, two]) and not divergence.losses_diverged([one, one])
    assert not divergence.losses_diverged([[NAN] * 4, good]) and not divergence.losses_diverged([])


def test_the_scale_does_not_fall_below_one():
    scaler = optimizer.LossScaler(True)
    for _ in range(16):
        scaler.update(False)
    assert scaler.scale == 1
    with pytest.raises(UserError, match="collapsed: the gradient is not finite in 17 steps in a row"):
        scaler.update(False)
    assert scaler.scale == 1 and scaler.overflows == 16


def test_twenty_overflows_in_a_row_are_too_many_whatever_the_scale():
    scaler = optimizer.LossScaler(True)
    scaler.scale = 2.0**40
    for _ in range(19):
        scaler.update(False)
    with pytest.raises(UserError, match="20 steps in a row"):
        scaler.update(False)
    scaler.overflows = 5
    scaler.update(True)
    assert scaler.overflows == 0


def test_a_collapsed_scale_changes_no_weight():
    weight = torch.nn.Parameter(torch.ones(8))
    parameters = tiny_training.params.load("params.yaml").train
    lion = optimizer.Lion([("lora_unet_a.lokr_w1", weight)], parameters)
    scaler = optimizer.LossScaler(True)
    scaler.scale = 1.0
    with pytest.raises(UserError, match="loss scale collapsed"):
        lion.step(100, torch.full((8,), math.inf), scaler)
    assert torch.equal(weight.detach(), torch.ones(8)) and not lion.tensors()


def test_a_resumed_scaler_is_the_one_that_its_journal_describes(tmp_path):
    """No state holds it: overflows, growth after 2,000 good steps, and the overflows in a row follow from the norms."""
    whole, norms = optimizer.LossScaler(True), [NAN, *[1.0] * 2003, math.inf, NAN, NAN]
    for norm in norms:
        whole.update(math.isfinite(norm))
    loop = training_loop.TrainingLoop.__new__(training_loop.TrainingLoop)
    loop.scaler, loop.adapter, loop.optimizer = optimizer.LossScaler(True), Nothing(), Nothing()
    rows = [{"gradient_norm": norm} for norm in norms]
    loop.load_state(len(rows), checkpointing.TrainingState({}, journal.Journal({}, rows)))
    assert vars(loop.scaler) == vars(whole) and whole.scale == 65536 / 2 * 2 / 8 and whole.overflows == 3
    assert loop.updates == 2003
