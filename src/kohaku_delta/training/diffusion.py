"""Invariant: SDXL's forward process and the loss of an image, as in the papers.

x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, scaled-linear β from 0.00085 to 0.012 in 1000 steps (DDPM, Ho et al. 2020; Stable Diffusion's β);
loss = min(SNR_t, γ) / SNR_t · ‖ε − ε_θ‖², SNR_t = ᾱ_t / (1 − ᾱ_t) (min-SNR, Hang et al. 2023, for ε-prediction).
"""

import torch

BETA_FIRST, BETA_LAST, TIME_STEPS = 0.00085, 0.012, 1000


def alphas_cumprod() -> torch.Tensor:
    """ᾱ_t, float32, 1000, on the CPU, in the arithmetic of diffusers' DDPMScheduler."""
    betas = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, TIME_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, time_steps: torch.Tensor, acp: torch.Tensor) -> torch.Tensor:
    """x_t; latents and noise (B, C, H, W), time_steps (B,) int64."""
    a = acp[time_steps].to(latents.dtype)[:, None, None, None]
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def weights(time_steps: torch.Tensor, acp: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) / SNR, float32 (B,)."""
    a = acp[time_steps]
    snr = a / (1 - a)
    return torch.clamp(snr, max=gamma) / snr


def losses(predicted: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted loss of each image, float32 (B,)."""
    return (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3)) * weight
