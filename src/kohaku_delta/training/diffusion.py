"""Invariant: SDXL's forward process and the loss of an image, as in the papers, with the same bits on every processor.

x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, scaled-linear β from 0.00085 to 0.012 in 1000 steps (DDPM, Ho et al. 2020; Stable
Diffusion's β); loss = min(SNR_t, γ) / SNR_t · ‖ε − ε_θ‖², SNR_t = ᾱ_t / (1 − ᾱ_t) (min-SNR, Hang et al. 2023, for
ε-prediction).

The square roots are numpy's, which IEEE 754 rounds correctly. `torch.sqrt` on the CPU goes to MKL's vector library,
whose last bit depends on the processor (numerics/operators.py).
"""

import math
from typing import NamedTuple

import numpy as np
import torch

BETA_FIRST, BETA_LAST, TIME_STEPS = 0.00085, 0.012, 1000


def alphas_cumprod() -> torch.Tensor:
    """ᾱ_t, float32, 1000, on the CPU, in the arithmetic of diffusers' DDPMScheduler."""
    betas = torch.linspace(math.sqrt(BETA_FIRST), math.sqrt(BETA_LAST), TIME_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


class Amplitudes(NamedTuple):
    """√ᾱ_t and √(1 − ᾱ_t) of every time step, (1000,) each, in one dtype on one device."""

    signal: torch.Tensor
    noise: torch.Tensor


def amplitudes(dtype: torch.dtype, device: str = "cpu") -> Amplitudes:
    """The two tables; as in diffusers' add_noise, ᾱ is rounded to `dtype` first."""
    acp = alphas_cumprod().to(dtype)
    roots = (torch.from_numpy(np.sqrt(part.float().numpy())) for part in (acp, 1 - acp))
    return Amplitudes(*(root.to(device, dtype) for root in roots))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, time_steps: torch.Tensor, table: Amplitudes) -> torch.Tensor:
    """x_t; latents and noise (B, C, H, W), time_steps (B,) int64. Float32 noise gives a float32 x_t, as in the
    release's trainer.
    """
    signal, spread = (each[time_steps][:, None, None, None] for each in table)
    return signal * latents + spread * noise


def weights(time_steps: torch.Tensor, acp: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) / SNR, float32 (B,)."""
    a = acp[time_steps]
    snr = a / (1 - a)
    return torch.clamp(snr, max=gamma) / snr


def losses(predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted loss of each image, float32 (B,); `noise` is the float32 target."""
    return (predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weight
