"""The forward process and the loss against diffusers' DDPMScheduler and closed forms."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from kohaku_delta.training import diffusion

THEIRS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def test_the_schedule_is_bit_equal_to_diffusers():
    assert torch.equal(diffusion.alphas_cumprod(), THEIRS.alphas_cumprod)


@pytest.mark.parametrize("part", ["signal", "noise"])
def test_both_amplitudes_are_correctly_rounded_square_roots(part):
    """IEEE 754: no float32 is nearer to √a, in exact arithmetic. torch.sqrt fails this for some steps, which depend on
    the processor.
    """
    acp = diffusion.alphas_cumprod()
    under = (acp if part == "signal" else 1 - acp).tolist()
    for a, root in zip(under, getattr(diffusion.amplitudes(torch.float32), part).numpy(), strict=True):
        below, above = (Fraction(float(np.nextafter(root, np.float32(end)))) for end in (0, 2))
        assert ((below + Fraction(float(root))) / 2) ** 2 <= Fraction(a) <= ((Fraction(float(root)) + above) / 2) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adding_noise_is_diffusers_to_the_last_bit_of_the_square_roots(dtype):
    generator = torch.Generator().manual_seed(1)
    latents, noise = (
        torch.randn(8, 4, 6, 5, generator=generator).to(dtype),
        torch.randn(8, 4, 6, 5, generator=generator).to(dtype),
    )
    steps = torch.tensor([0, 1, 10, 100, 500, 900, 998, 999])
    ours, theirs = (
        diffusion.add_noise(latents, noise, steps, diffusion.amplitudes(dtype)),
        THEIRS.add_noise(latents, noise, steps),
    )
    assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_float32_noise_is_not_rounded_to_the_latents_precision():
    """As in the release's trainer: the noise with its offset, the target, stays float32; x_t is rounded once."""
    latents, noise = torch.zeros(1, 4, 2, 2, dtype=torch.float16), torch.full((1, 4, 2, 2), 1.0001)
    noisy = diffusion.add_noise(latents, noise, torch.tensor([999]), diffusion.amplitudes(torch.float16))
    assert noisy.dtype == torch.float32 and torch.allclose(
        noisy, noise * diffusion.amplitudes(torch.float16).noise[999].float()
    )


def test_min_snr_is_one_for_strong_noise_and_gamma_over_snr_for_weak_noise():
    acp = diffusion.alphas_cumprod()
    weight = diffusion.weights(torch.arange(1000), acp, 5.0).double()
    snr = acp.double() / (1 - acp.double())
    assert torch.allclose(weight, torch.clamp(5.0 / snr, max=1.0), rtol=1e-5)
    assert weight[999] == 1.0 and weight[0] < 0.01


def test_the_loss_is_the_mean_square_per_image():
    predicted, noise = torch.full((2, 4, 3, 3), 2.0), torch.zeros(2, 4, 3, 3)
    assert diffusion.losses(predicted, noise, torch.tensor([1.0, 0.25])).tolist() == [4.0, 1.0]
