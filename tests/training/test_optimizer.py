"""Lion8bit against Lion's closed form, the release's rates, and the scaler's rules."""

import math
from fractions import Fraction

import pytest
import torch

from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.training import optimizer

PARAMETERS = load("params.yaml").train.model_copy(
    update={"warmup_steps": 0, "learning_rate_unet": 0.01, "learning_rate_text": 0.001, "clip_norm": 1e9}
)


def make_optimizer(elements):
    generator = torch.Generator().manual_seed(5)
    trained = [
        (name, torch.nn.Parameter(torch.randn(elements, generator=generator)))
        for name in ("lora_te1_a.lokr_w1", "lora_unet_b.lokr_w1")
    ]
    return optimizer.Lion(trained, PARAMETERS), trained, generator


def test_small_tensors_follow_lion_exactly_in_both_groups():
    lion, trained, generator = make_optimizer(100)
    scaler, momentum = optimizer.LossScaler(False), torch.zeros(2, 100)
    expected = torch.stack([weight.detach().clone() for _, weight in trained])
    rate = torch.tensor([[0.001], [0.01]])
    for step in range(5):
        gradient = torch.randn(200, generator=generator)
        g = gradient.reshape(2, 100)
        expected = expected * (1 - rate * 0.1) - rate * torch.sign(0.9 * momentum + 0.1 * g)
        momentum = 0.95 * momentum + 0.05 * g
        lion.step(step, gradient.clone(), scaler)
    assert torch.allclose(torch.stack([weight.detach() for _, weight in trained]), expected, atol=1e-6)


def test_large_tensors_keep_their_momentum_in_8_bits():
    lion, trained, generator = make_optimizer(8192)
    lion.step(0, torch.randn(16384, generator=generator), optimizer.LossScaler(False))
    assert {tensor.dtype for name, tensor in lion.tensors().items() if name.endswith("state1")} == {torch.uint8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_tensors_follow_lion_with_a_momentum_rounded_to_8_bits_a_block_of_256(dtype):
    """Lion written out, its momentum passed through bitsandbytes' own block quantisation after every step."""
    from bitsandbytes import functional

    lion, trained, generator = make_optimizer(8192)
    expected = []
    for _, weight in trained:
        weight.data = weight.data.to(dtype)
        expected.append(weight.detach().float().clone())
    code, momentum = functional.create_dynamic_map(signed=True), [torch.zeros(8192), torch.zeros(8192)]
    for step in range(4):
        gradient = torch.randn(16384, generator=generator)
        lion.step(step, gradient.clone(), optimizer.LossScaler(False))
        for index, (rate, (_, weight)) in enumerate(zip((0.001, 0.01), trained, strict=True)):
            g = gradient[8192 * index : 8192 * (index + 1)].to(dtype).float()
            moved = expected[index] * (1 - rate * 0.1) - rate * torch.sign(0.9 * momentum[index] + 0.1 * g)
            expected[index] = moved.to(dtype).float()
            momentum[index] = functional.dequantize_blockwise(
                *functional.quantize_blockwise(0.95 * momentum[index] + 0.05 * g, code=code, blocksize=256)
            )
            assert torch.allclose(
                weight.detach().float(), expected[index], rtol=0, atol=1e-6 if dtype == torch.float32 else 0
            ), step


def test_a_zero_gradient_leaves_weight_decay_alone_at_each_groups_rate():
    lion, trained, _ = make_optimizer(100)
    before = [weight.detach().clone() for _, weight in trained]
    lion.step(0, torch.zeros(200), optimizer.LossScaler(False))
    for rate, weight, (_, after) in zip((0.001, 0.01), before, trained, strict=True):
        assert torch.allclose(after, weight * (1 - rate * 0.1), rtol=1e-6, atol=0)


def test_a_loaded_state_continues_to_the_same_bits():
    gradients = [torch.randn(16384, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    lion, trained, _ = make_optimizer(8192)
    for step, gradient in enumerate(gradients[:2]):
        lion.step(step, gradient.clone(), optimizer.LossScaler(False))
    other, copied, _ = make_optimizer(8192)
    for (_, to), (_, weight) in zip(copied, trained, strict=True):
        to.data.copy_(weight.data)
    other.load({name: tensor.clone() for name, tensor in lion.tensors().items()}, 2)
    for step, gradient in enumerate(gradients[2:], 2):
        lion.step(step, gradient.clone(), optimizer.LossScaler(False))
        other.step(step, gradient.clone(), optimizer.LossScaler(False))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(trained, copied, strict=True))


def test_the_gradient_is_clipped_to_norm_one():
    lion, _, _ = make_optimizer(100)
    lion.parameters = PARAMETERS.model_copy(update={"clip_norm": 1.0})
    gradient = torch.full((200,), 3.0)
    norm, *_ = lion.step(0, gradient, optimizer.LossScaler(False))
    assert norm == pytest.approx(3 * 200**0.5) and gradient.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_the_release_warms_up_in_50_updates_of_which_the_first_has_rate_0():
    rates = [optimizer.learning_rate(step, 4e-5, 50) for step in range(60)]
    assert rates[0] == 0 and rates[25] == 2e-5 and rates[49] < 4e-5 and set(rates[50:]) == {4e-5}


@pytest.mark.parametrize(
    "path, rates, warmup, processes",
    [("params.yaml", (4e-5, 1e-5), 100, 2), ("recipes/epsilon-rev1/params.yaml", (2e-5, 5e-6), 1000, 4)],
)
def test_the_rates_are_those_of_the_published_scheduler_advanced_once_per_process_and_update(
    path, rates, warmup, processes
):
    """diffusers' constant schedule with the published warm-up steps, as accelerate drove it: every process counts."""
    from diffusers.optimization import get_constant_schedule_with_warmup

    recipe = load(path).train
    theirs = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])
    scheduler = get_constant_schedule_with_warmup(theirs, warmup)
    for step in range(warmup // processes + 20):
        ours = [
            optimizer.learning_rate(step, base, recipe.warmup_steps)
            for base in (recipe.learning_rate_unet, recipe.learning_rate_text)
        ]
        assert ours == [group["lr"] for group in theirs.param_groups], step
        theirs.step()
        for _ in range(processes):
            scheduler.step()


def test_clipping_is_that_of_torch():
    generator = torch.Generator().manual_seed(8)
    for size in (0.01, 0.999, 1.5, 400.0):
        gradient = torch.randn(200, generator=generator)
        gradient *= size / gradient.norm()
        theirs = torch.nn.Parameter(torch.zeros(200))
        theirs.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        lion, _, _ = make_optimizer(100)
        lion.parameters = PARAMETERS.model_copy(update={"clip_norm": 1.0})
        ours = gradient.clone()
        assert lion.step(0, ours, optimizer.LossScaler(False))[0] == pytest.approx(norm.item(), rel=1e-6)
        assert torch.allclose(ours, theirs.grad, rtol=1e-6)


def test_the_norm_is_that_of_the_whole_gradient_however_it_is_cut(monkeypatch):
    gradient = torch.randn(1001, generator=torch.Generator().manual_seed(6)) * 1e3
    exact = math.sqrt(sum(Fraction(value) ** 2 for value in gradient.tolist()))
    whole = optimizer.norm(gradient)
    assert whole == torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
    monkeypatch.setattr(optimizer, "PIECE", 100)
    assert optimizer.norm(gradient) == pytest.approx(exact, rel=1e-15) == pytest.approx(whole, rel=1e-15)
    gradient[700] = math.nan
    assert math.isnan(optimizer.norm(gradient))


def test_the_scale_is_taken_off_before_the_norm_and_moves_as_torchs_scaler_moves_it():
    lion, _, _ = make_optimizer(100)
    scaler, theirs = optimizer.LossScaler(True), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.zeros(200))
    reference = torch.optim.SGD([weight], lr=0.0)
    generator = torch.Generator().manual_seed(9)
    for step, overflow in enumerate([True, False, True, False, False]):
        gradient = torch.randn(200, generator=generator)
        if overflow:
            gradient[7] = float("inf")
        weight.grad = theirs.scale(gradient.clone())
        norm, *_ = lion.step(step, gradient * scaler.scale, scaler)
        theirs.step(reference)
        theirs.update()
        assert scaler.scale == theirs.get_scale()
        assert overflow or norm == pytest.approx(gradient.norm().item(), rel=1e-6)


def test_a_state_without_an_update_is_loaded():
    """Every step so far overflowed: nothing was initialized, nothing was saved."""
    lion, trained, _ = make_optimizer(8192)
    lion.step(0, torch.full((16384,), float("nan")), optimizer.LossScaler(True))
    assert lion.tensors() == {}
    other, copied, generator = make_optimizer(8192)
    other.load({}, 1)
    gradient = torch.randn(16384, generator=generator)
    for each in (lion, other):
        each.step(1, gradient.clone(), optimizer.LossScaler(False))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(trained, copied, strict=True))


def test_an_overflow_halves_the_scale_and_skips_the_update():
    lion, trained, _ = make_optimizer(100)
    before = [weight.detach().clone() for _, weight in trained]
    scaler = optimizer.LossScaler(True)
    lion.step(0, torch.full((200,), float("inf")), scaler)
    assert scaler.scale == 32768 and all(torch.equal(a, b) for a, (_, b) in zip(before, trained, strict=True))


def test_the_scale_doubles_after_2000_good_steps():
    scaler = optimizer.LossScaler(True)
    for _ in range(1999):
        scaler.update(True)
    assert scaler.scale == 65536
    scaler.update(True)
    assert scaler.scale == 131072


@pytest.mark.parametrize("version", ["0.36.0", "0.38.0.post2", "0.40.2", "0.41.0"])
def test_the_broken_bitsandbytes_are_refused(version):
    with pytest.raises(UserError, match="broken"):
        optimizer.check_bitsandbytes(version)


@pytest.mark.parametrize("version", ["0.35.4", "0.41.1", "0.42.0", "0.50.2"])
def test_other_bitsandbytes_are_taken(version):
    optimizer.check_bitsandbytes(version)
