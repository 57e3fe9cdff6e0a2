"""The forward process and the loss against diffusers' DDPMScheduler and closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler

from kohaku_delta.training import diffusion

THEIRS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def test_the_schedule_is_bit_equal_to_diffusers():
    assert torch.equal(diffusion.alphas_cumprod(), THEIRS.alphas_cumprod)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adding_noise_is_bit_equal_to_diffusers(dtype):
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(8, 4, 6, 5, generator=generator).to(dtype), torch.randn(8, 4, 6, 5, generator=generator).to(dtype)
    steps = torch.tensor([0, 1, 10, 100, 500, 900, 998, 999])
    assert torch.equal(diffusion.add_noise(latents, noise, steps, diffusion.alphas_cumprod()), THEIRS.add_noise(latents, noise, steps))


def test_min_snr_is_one_where_the_noise_is_strong_and_gamma_over_snr_where_it_is_weak():
    acp = diffusion.alphas_cumprod()
    weight = diffusion.weights(torch.arange(1000), acp, 5.0).double()
    snr = acp.double() / (1 - acp.double())
    assert torch.allclose(weight, torch.clamp(5.0 / snr, max=1.0), rtol=1e-5)
    assert weight[999] == 1.0 and weight[0] < 0.01


def test_the_loss_is_the_mean_square_an_image():
    predicted, noise = torch.full((2, 4, 3, 3), 2.0), torch.zeros(2, 4, 3, 3)
    assert diffusion.losses(predicted, noise, torch.tensor([1.0, 0.25])).tolist() == [4.0, 1.0]
