"""Invariant: a picture is a function of (model, prompt, seed): DDIM with classifier-free guidance, nothing drawn on the
way.

x_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t;  x_s = √ᾱ_s x_0 + √(1−ᾱ_s) ε  (Song et al. 2020, η = 0);  ε = ε_∅ + w (ε_c − ε_∅) (Ho &
Salimans 2022).
"""

import numpy as np
import torch

from kohaku_delta.params import Preview
from kohaku_delta.training import conditioning, sample_rng
from kohaku_delta.training.batch_builder import LATENT_CHANNELS
from kohaku_delta.training.diffusion import TIME_STEPS
from kohaku_delta.training.sdxl_model import Sdxl


@torch.no_grad()
def sample_images(
    model: Sdxl, tokenizers: tuple, parameters: Preview, latent_step: int, length: int
) -> list[np.ndarray]:
    """A picture a prompt, (height, width, 3) uint8. `length`: tokens a caption may have (75, 150, 225)."""
    first, second = tokenizers
    texts = parameters.prompts + [parameters.negative] * len(parameters.prompts)
    count, size = len(parameters.prompts), (parameters.height, parameters.width)
    ids1 = torch.stack([conditioning.token_chunks(first, text, length, first.eos_token_id) for text in texts]).to(
        model.device
    )
    ids2 = torch.stack([conditioning.token_chunks(second, text, length, 0) for text in texts]).to(model.device)
    context, pooled = model.conditions(ids1, ids2)
    time_ids = torch.tensor([[*size, 0.0, 0.0, *size]] * len(texts), device=model.device)
    shape = (LATENT_CHANNELS, size[0] // latent_step, size[1] // latent_step)
    x = torch.stack(
        [
            torch.from_numpy(sample_rng.normal_for(shape, parameters.seed, index, sample_rng.NOISE))
            for index in range(count)
        ]
    ).to(model.device, model.precision)
    times = [TIME_STEPS - 1 - index * TIME_STEPS // parameters.steps for index in range(parameters.steps)]
    for now, later in zip(times, [*times[1:], None]):
        step = torch.full((2 * count,), now, device=model.device)
        predicted = model.models["unet"](
            torch.cat([x, x]),
            step,
            context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]
        wanted, unwanted = predicted.chunk(2)
        noise = unwanted + parameters.guidance * (wanted - unwanted)
        signal, spread = (table[now] for table in model.amplitudes)
        clean = (x - spread * noise) / signal
        if later is None:
            x = clean
        else:
            signal, spread = (table[later] for table in model.amplitudes)
            x = signal * clean + spread * noise
    pictures = [
        model.models["vae"].decode(each[None].float() / model.vae_scaling, return_dict=False)[0][0] for each in x
    ]
    return [((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy() for picture in pictures]
