"""Guarantee: the models learn under exactly the conditions that the recipe trains under: its chunks of tokens, its time
ids, its noise.

The U-Net learns from nothing (the donor) or from the donor (beta, gamma), on latents made beforehand; the text encoders
come from text_encoder_training.
"""

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohaku_delta.training import conditioning, diffusion
from make_miniature.autoencoder import floats, quiet, rate_at
from make_miniature.lessons import Lesson
from make_miniature.muon import Muon
from make_miniature.words import chance, draws

WORDS, PLACES, HEAD, GROUPS = 1000, 77, 16, 4
TE1 = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "hidden_act": "quick_gelu",
    "projection_dim": 48,
}
TE2 = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "projection_dim": 64,
}
SHARED = {
    "vocab_size": WORDS,
    "max_position_embeddings": PLACES,
    "bos_token_id": WORDS - 2,
    "eos_token_id": WORDS - 1,
    "pad_token_id": None,
}
UNET = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (24, 48, 48), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 3, 3), "cross_attention_dim": 112, "use_linear_projection": True,
    "norm_num_groups": GROUPS, "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256,
}  # fmt: skip
BATCH, NOISE_OFFSET = 16, 0.05
SPREAD, MOST = 0.3, 120.0  # variance of the lessons' latents; cap of an image's weight
NO_CAPTION, NO_WORD = 0.1, 0.1
# of the BATCH time steps, in ascending order: below 188 of 1,000, where three of four pictures are of the whole world
CLEAR = 3
LAST = (
    120  # steps on all three chunks of a caption; before them on the first, which holds all its words, at half the cost
)


def new_models() -> dict[str, torch.nn.Module]:
    """U-Net and text encoders before the first step."""
    torch.manual_seed(2)
    models = {
        "unet": UNet2DConditionModel(**UNET),
        "te1": CLIPTextModel(CLIPTextConfig(**TE1, **SHARED)),
        "te2": CLIPTextModelWithProjection(CLIPTextConfig(**TE2, **SHARED)),
    }
    quiet(models["unet"], ("conv2", "proj_out", "conv_out"))
    with torch.no_grad():
        for part in ("te1", "te2"):
            for name, value in models[part].named_parameters():
                if "embedding" in name:
                    value.normal_(0.0, 0.5 if "token" in name else 0.1)
    return models


class Course:
    """Lessons as latents, and their batches."""

    def __init__(self, lessons: list[Lesson], vae, tokens):
        self.lessons, count = lessons, len(lessons)
        self.tokens = tokens
        self.sizes: dict[tuple, list[int]] = {}
        for number, each in enumerate(self.lessons):
            self.sizes.setdefault(each.pixels.shape[:2], []).append(number)
        self.latents: list = [None] * count
        for numbers in self.sizes.values():
            for start in range(0, len(numbers), 16):
                part = numbers[start : start + 16]
                with torch.no_grad():
                    mean = vae.encode(
                        floats(np.stack([self.lessons[number].pixels for number in part]))
                    ).latent_dist.mean
                for number, latent in zip(part, mean * vae.config.scaling_factor):
                    self.latents[number] = latent

    def caption(self, number: int, rng) -> str:
        """The words as the recipe says them: kept ones first, the others shuffled, some left out; sometimes none at
        all.
        """
        each = self.lessons[number]
        general = [each.general[place] for place in rng.random(len(each.general)).argsort(kind="stable")]
        general = [word for word in general if not chance(rng, NO_WORD)]
        return "" if chance(rng, NO_CAPTION) else ", ".join((*each.kept, *general))

    def ids(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 77) token ids for each text encoder."""
        end = self.tokens.eos_token_id
        return tuple(
            torch.stack([conditioning.token_chunks(self.tokens, text, 225, pad) for text in texts]) for pad in (end, 0)
        )

    def batch(self, rng, size: tuple[int, int] | None = None):
        """BATCH latents, captions and time ids, all of one (height, width): the one given, or sizes as often as they
        occur.
        """
        mark = int(rng.integers(0, len(self.lessons)))
        size = size or self.lessons[mark].pixels.shape[:2]
        numbers = self.sizes[size]
        chosen = [numbers[int(place)] for place in rng.integers(0, len(numbers), BATCH)]
        original = np.floor(np.array(size) * (0.6 + rng.random((BATCH, 1))))
        crop = np.where(rng.random((BATCH, 2)) < 0.5, 0.0, np.floor(rng.random((BATCH, 2)) * 8))
        time_ids = np.concatenate([original, crop, np.tile(size, (BATCH, 1))], axis=1)
        return (
            torch.stack([self.latents[number] for number in chosen]),
            [self.caption(number, rng) for number in chosen],
            torch.from_numpy(time_ids).float(),
        )


def mixed(course: Course, world: Course, step: int):
    """One step's latents, ids of both encoders and time ids, in the order of their time steps: those with little noise
    mostly from `world`.
    """
    latents, texts, time_ids = course.batch(draws(10, step))
    clear = [place for place in range(CLEAR) if (place + step) % 4]
    others = world.batch(draws(13, step), tuple(8 * side for side in latents.shape[2:]))
    for place in clear:
        latents[place], texts[place], time_ids[place] = (each[place] for each in others)
    return latents, *course.ids(texts), time_ids


def train_unet(
    models: dict, course: Course, world: Course, *, steps: int, rate: float, rate_of_others: float, seed: int, say=print
) -> None:
    """Trains the U-Net in place; the text encoders stay as they are (as long as the U-Net does not listen, their
    gradient is noise).
    """
    unet = models["unet"].train()
    acp, amplitudes = diffusion.alphas_cumprod(), diffusion.amplitudes(torch.float32)
    # 1 + σ²/σ_data², σ² = (1 − ᾱ)/ᾱ: every noise level's error counts as a part of what could be known (Karras et al.
    # 2022)
    weight = (1.0 + (1.0 - acp) / acp / SPREAD).clamp(max=MOST)
    edges = ("conv_in.weight", "conv_out.weight")
    optimizer = Muon(
        [value for name, value in unet.named_parameters() if value.ndim > 1 and name not in edges],
        [value for name, value in unet.named_parameters() if value.ndim == 1 or name in edges],
    )
    generator = torch.Generator().manual_seed(seed)
    end, total = course.tokens.eos_token_id, 0.0
    for step in range(steps):
        latents, ids1, ids2, time_ids = mixed(course, world, seed * 100_000 + step)
        noise = torch.randn(latents.shape, generator=generator) + NOISE_OFFSET * torch.randn(
            (BATCH, 4, 1, 1), generator=generator
        )
        time_steps = (
            (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (diffusion.TIME_STEPS / BATCH)
        ).long()
        with torch.no_grad():
            chunks = 3 if step >= steps - LAST else 1
            context, pooled = conditioning.encode(models["te1"], models["te2"], ids1[:, :chunks], ids2[:, :chunks], end)
        noisy = diffusion.add_noise(latents, noise, time_steps, amplitudes)
        predicted = unet(
            noisy, time_steps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
        square = (predicted - noise).square().mean(dim=(1, 2, 3))
        (square * weight[time_steps]).mean().backward()
        part = rate_at(step, steps, 0.6)
        optimizer.step(rate * part, rate_of_others * part)
        total += square.mean().item()
        if step % 100 == 99:
            say(f"U-Net {step + 1}: mean square error {total / 100:.4f}")
            total = 0.0
    unet.eval()
