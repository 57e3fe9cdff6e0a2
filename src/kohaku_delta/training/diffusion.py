"""SDXL's forward process and the loss per image, as in the papers, with the same bits on every processor.

    β_t   scaled-linear from 0.00085 to 0.012, t = 0 … 999 (Stable Diffusion)
    ᾱ_t   = Π_{s≤t} (1 − β_s)
    x_t   = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε                          DDPM, Ho et al. 2020
    SNR_t = ᾱ_t / (1 − ᾱ_t)
    loss  = min(SNR_t, γ) / SNR_t · mean((ε − ε_θ(x_t, t))²)     min-SNR for ε-prediction, Hang et al. 2023

The square roots are numpy's, which are correctly rounded (IEEE 754). `torch.sqrt` on the CPU uses MKL's vector library,
whose last bit depends on the processor (numerics/operators.py).
"""

import math
from typing import NamedTuple

import numpy as np
import torch

BETA_FIRST, BETA_LAST, TIME_STEPS = 0.00085, 0.012, 1000


def alphas_cumprod() -> torch.Tensor:
    """ᾱ_t, (1000,) float32 on the CPU, in the arithmetic of diffusers' DDPMScheduler."""
    betas = torch.linspace(math.sqrt(BETA_FIRST), math.sqrt(BETA_LAST), TIME_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


class Amplitudes(NamedTuple):
    """√ᾱ_t and √(1 − ᾱ_t) of every time step, (1000,) each, in one dtype on one device."""

    signal: torch.Tensor
    noise: torch.Tensor


def amplitudes(dtype: torch.dtype, device: str = "cpu") -> Amplitudes:
    """The two tables; as in diffusers' add_noise, ᾱ is first rounded to `dtype`."""
    acp = alphas_cumprod().to(dtype)
    signal, noise = (torch.from_numpy(np.sqrt(part.float().numpy())).to(device, dtype) for part in (acp, 1 - acp))
    return Amplitudes(signal, noise)


def add_noise(x_0: torch.Tensor, noise: torch.Tensor, time_steps: torch.Tensor, table: Amplitudes) -> torch.Tensor:
    """x_t of latents x_0 and noise ε, (B, C, H, W) each; time_steps (B,) int64.

    With float32 noise x_t is float32, as in the release's trainer.
    """
    sqrt_acp, sqrt_one_minus_acp = (amplitude[time_steps][:, None, None, None] for amplitude in table)
    return sqrt_acp * x_0 + sqrt_one_minus_acp * noise


def weights(time_steps: torch.Tensor, acp: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR_t, γ) / SNR_t, float32 (B,). `acp`: ᾱ_t as alphas_cumprod() gives it."""
    snr = acp[time_steps] / (1 - acp[time_steps])
    return torch.clamp(snr, max=gamma) / snr


def losses(predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted loss of each image, float32 (B,); `noise` is the float32 target ε."""
    return (predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weight
