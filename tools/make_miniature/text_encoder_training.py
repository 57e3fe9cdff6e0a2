"""Trains both text encoders to predict what a caption's image looks like, before the U-Net is trained (unet_training.py).

As CLIP is trained before the U-Net: a small head, discarded afterwards, must predict the image's latents at 8 × 8 from
the two states that the U-Net is conditioned on (text encoder 1's penultimate state at the end token, text encoder 2's
projected state).
"""

import torch
import torch.nn.functional as F
from torch import nn

from make_miniature.autoencoder import rate_at
from make_miniature.muon import Muon
from make_miniature.portable_math import standard_deviation
from make_miniature.words import draws

BATCH, SIDE = 32, 8


def train_text_encoders(te1, te2, course, *, steps: int, rate: float, rate_of_others: float, say=print) -> None:
    """Train the encoders in place on a course's examples."""
    torch.manual_seed(3)
    targets = torch.stack([F.adaptive_avg_pool2d(each, SIDE).flatten() for each in course.latents])
    targets = (targets - targets.mean(dim=0)) / standard_deviation(targets)
    head = nn.Sequential(
        nn.Linear(te1.config.hidden_size + te2.config.projection_dim, 256), nn.SiLU(), nn.Linear(256, targets.shape[1])
    )
    named = [pair for model in (te1, te2, head) for pair in model.named_parameters()]
    alone = [value.ndim == 1 or "embedding.weight" in name for name, value in named]
    optimizer = Muon(
        [value for (_, value), is_alone in zip(named, alone, strict=True) if not is_alone],
        [value for (_, value), is_alone in zip(named, alone, strict=True) if is_alone],
    )
    rows, end, total = torch.arange(BATCH), course.tokens.eos_token_id, 0.0
    for step in range(steps):
        rng = draws(11, step)
        chosen = rng.integers(0, len(course.lessons), BATCH).tolist()
        ids1, ids2 = course.ids([course.caption(number, rng) for number in chosen])
        first = te1(ids1[:, 0], output_hidden_states=True).hidden_states[-2][
            rows, (ids1[:, 0] == end).int().argmax(dim=1)
        ]
        loss = (head(torch.cat([first, te2(ids2[:, 0]).text_embeds], dim=1)) - targets[chosen]).square().mean()
        loss.backward()
        part = rate_at(step, steps, 0.5)
        optimizer.step(rate * part, rate_of_others * part)
        total += loss.item()
        if step % 100 == 99:
            say(f"text encoders {step + 1}: unexplained part {total / 100:.4f}")
            total = 0.0
    for model in (te1, te2):
        model.requires_grad_(False).eval()
