"""DDIM with classifier-free guidance: a picture is a function of (model, prompt, seed).

x_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t;  x_s = √ᾱ_s x_0 + √(1−ᾱ_s) ε  (Song et al. 2020, η = 0);  ε = ε_∅ + w (ε_c − ε_∅) (Ho &
Salimans 2022).
"""

from typing import Any

import numpy as np
import torch

from kohaku_delta.params import Preview
from kohaku_delta.training import conditioning, sample_rng
from kohaku_delta.training.batch_builder import LATENT_CHANNELS
from kohaku_delta.training.diffusion import TIME_STEPS
from kohaku_delta.training.sdxl_model import Sdxl


@torch.no_grad()
def sample_images(
    model: Sdxl, tokenizers: tuple, parameters: Preview, pixels_per_latent: int, max_tokens: int
) -> list[np.ndarray]:
    """One picture per prompt, uint8 (height, width, 3). pixels_per_latent: 8 for SDXL; max_tokens: 75, 150 or 225."""
    count, size = len(parameters.prompts), (parameters.height, parameters.width)
    texts = parameters.prompts + [parameters.negative] * count
    ids1, ids2 = conditioning.token_ids(tokenizers, texts, max_tokens)
    context, pooled = model.conditions(ids1.to(model.device), ids2.to(model.device))
    time_ids = torch.tensor([[*size, 0.0, 0.0, *size]] * len(texts), device=model.device)
    shape = (LATENT_CHANNELS, size[0] // pixels_per_latent, size[1] // pixels_per_latent)
    noises = [sample_rng.normal_for(shape, parameters.seed, index, sample_rng.NOISE) for index in range(count)]
    x = torch.stack([torch.from_numpy(noise) for noise in noises]).to(model.device, model.precision)
    times = [TIME_STEPS - 1 - index * TIME_STEPS // parameters.steps for index in range(parameters.steps)]
    for now, later in zip(times, [*times[1:], None], strict=True):
        predicted = model.models["unet"](
            torch.cat([x, x]),
            torch.full((2 * count,), now, device=model.device),
            context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]
        conditional, unconditional = predicted.chunk(2)
        noise = unconditional + parameters.guidance * (conditional - unconditional)
        signal, spread = (table[now] for table in model.amplitudes)
        x = (x - spread * noise) / signal
        if later is not None:
            signal, spread = (table[later] for table in model.amplitudes)
            x = signal * x + spread * noise
    return [_decode(model, latent) for latent in x]


def _decode(model: Sdxl, latent: torch.Tensor) -> np.ndarray:
    vae: Any = model.models["vae"]
    picture = vae.decode(latent[None].float() / model.vae_scaling, return_dict=False)[0][0]
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
