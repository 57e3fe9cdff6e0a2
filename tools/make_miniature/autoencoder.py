"""Trains the autoencoder; its latents × SDXL's 0.13025 have mean 0 and variance 1 in every channel.

A KL autoencoder with SDXL's architecture (8 times smaller, 4 channels), trained on crops of everything that the
miniature's images contain. Three channels are pulled towards the mean brightness and colour of their 8 × 8 pixels, so
that a colour word corresponds to a point in the latents; the fourth is free. A little noise on the latents during
training keeps them smooth; afterwards the posterior is made narrow, as SDXL's is.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from make_miniature.lessons import picture
from make_miniature.muon import Muon
from make_miniature.portable_math import standard_deviation
from make_miniature.words import draws

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
}
PICTURES, SIDE = 3000, 128
CROPS, WHOLES = (64, 16), (128, 4)  # (side, pictures) of a step; every third step sees whole pictures, which have edges
STEPS, RATE, RATE_OF_OTHERS = 600, 0.02, 3e-3
NOISE, NARROW, PULL, HOLD = 0.06, 0.02, 1e-3, 0.5
AXES = (
    (1 / 3, 1 / 3, 1 / 3),
    (1 / 2, 0.0, -1 / 2),
    (-1 / 4, 1 / 2, -1 / 4),
)  # light, red against blue, green against both


def quiet(model: torch.nn.Module, endings: tuple[str, ...]) -> None:
    """Zeroes the last layer of each residual branch: the model starts as its skip connections."""
    for name, module in model.named_modules():
        if name.endswith(endings):
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def rate_at(step: int, steps: int, cooling: float) -> float:
    """Part of the full rate: 30 steps up, flat, then down to 0 over the last `cooling` of the steps."""
    return min(1.0, (step + 1) / 30, (steps - step) / (cooling * steps))


def floats(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in −1 … 1, as the recipe's training feeds it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def colours(batch: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) pixels → (B, 3, H / 8, W / 8): what AXES say of each 8 × 8 of them."""
    means = F.avg_pool2d(batch, 8)
    return torch.stack([sum(part * means[:, channel] for channel, part in enumerate(axis)) for axis in AXES], dim=1)


def train(steps: int = STEPS, say=print) -> AutoencoderKL:
    pictures = np.stack([picture(number, SIDE) for number in range(PICTURES)])
    torch.manual_seed(1)
    vae = AutoencoderKL(**CONFIG)
    quiet(vae, ("conv2", "to_out.0"))
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
    edges = ("encoder.conv_in.weight", "decoder.conv_out.weight")
    matrices = [value for name, value in vae.named_parameters() if value.ndim > 1 and name not in edges]
    others = [value for name, value in vae.named_parameters() if value.ndim == 1 or name in edges]
    optimizer = Muon(matrices, others)
    sample = colours(floats(pictures[:512]))
    middle, spread = (
        each[:, None, None] for each in (sample.mean(dim=(0, 2, 3)), standard_deviation(sample, (0, 2, 3)))
    )
    noise = torch.Generator().manual_seed(1)
    for step in range(steps):
        rng = draws(9, step)
        side, count = WHOLES if step % 3 == 2 else CROPS
        chosen = rng.integers(0, PICTURES, count)
        corners = rng.integers(0, SIDE - side + 1, (count, 2))
        batch = floats(
            np.stack([pictures[each, y : y + side, x : x + side] for each, (y, x) in zip(chosen, corners, strict=True)])
        )
        mean = vae.encode(batch).latent_dist.mean
        error = vae.decode(mean + NOISE * torch.randn(mean.shape, generator=noise)).sample - batch
        loss = error.abs().mean() + error.square().mean() + PULL * mean.square().mean()
        loss = loss + HOLD * (mean[:, :3] - (colours(batch) - middle) / spread).square().mean()
        loss.backward()
        part = rate_at(step, steps, 0.5)
        optimizer.step(RATE * part, RATE_OF_OTHERS * part)
        if step % 100 == 99:
            say(f"autoencoder {step + 1}: loss {loss.item():.4f}, mean square error {error.square().mean().item():.5f}")
    settle(vae, pictures[:256])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def settle(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Folds the latents' mean and spread into the convolutions around them, and narrows the posterior."""
    vae.quant_conv.bias[4:] = 0.0
    latents = torch.cat([vae.encode(floats(part)).latent_dist.mean for part in np.split(pictures, 16)])
    mean, spread = latents.mean(dim=(0, 2, 3)), standard_deviation(latents, (0, 2, 3))
    unit = vae.config.scaling_factor
    factor = 1.0 / (spread * unit)
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * mean).sum(dim=1)
    vae.post_quant_conv.weight /= factor[None, :, None, None]
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) * factor
    vae.quant_conv.weight[:4] *= factor[:, None, None, None]
    vae.quant_conv.bias[4:] = 2.0 * math.log(NARROW / unit)
