"""Square roots and sinusoids with the same bits on every processor.

On the CPU torch.sqrt uses MKL's vector library, whose last bit depends on the processor (docs/processors.md). numpy's
square root is correctly rounded, as IEEE 754 requires; sine, cosine and exponential are the C library's, in
double precision, rounded to float32 at the end.
"""

import math

import numpy as np
import torch


def square_root(values: torch.Tensor) -> torch.Tensor:
    """√ of a tensor without a gradient."""
    return torch.from_numpy(np.asarray(np.sqrt(values.detach().numpy())))


def standard_deviation(values: torch.Tensor, dim=None) -> torch.Tensor:
    """The standard deviation, over all of a tensor or over `dim`."""
    return square_root(values.detach().var(dim=dim))


def timestep_embedding(
    timesteps: torch.Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
):
    """diffusers' sinusoids, (N, embedding_dim) float32, for an even embedding_dim."""
    half = embedding_dim // 2
    frequencies = torch.tensor(
        [math.exp(-math.log(max_period) * place / (half - downscale_freq_shift)) for place in range(half)],
        dtype=torch.float32,
    )
    angles = (scale * (timesteps[:, None].float() * frequencies)).flatten().tolist()
    parts = [
        torch.tensor([function(angle) for angle in angles], dtype=torch.float32).view(-1, half)
        for function in (math.sin, math.cos)
    ]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1)
