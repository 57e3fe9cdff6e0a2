"""Random numbers per visit. Everything random about a visit is a function of (seed, visit).

So any step can be computed alone and in any order. A counter-based generator (Philox) keyed by (seed, visit) gives each
purpose its own stream. Numbers are drawn on the CPU in float64 and rounded once, so a GPU and a laptop use the same
noise.
"""

import numpy as np

from kohaku_delta.training.diffusion import TIME_STEPS

CAPTION, LATENT, NOISE, OFFSET, TIME = range(5)  # purposes


def rng_for(seed: int, visit: int, purpose: int) -> np.random.Generator:
    """The generator for one purpose of one visit."""
    return np.random.Generator(np.random.Philox(key=[seed, visit], counter=[0, 0, 0, purpose]))


def caption_for(text: str, separator: str, shuffle: bool, tag_dropout: float, seed: int, visit: int) -> str:
    """The text that is tokenized: the kept tags unchanged, then the general tags, shuffled and some of them dropped.

    As sd-scripts does with keep_tokens_separator: both parts are split at commas, and the separator itself disappears.
    A caption without a separator has no kept tags. `tag_dropout`: probability for each general tag.
    """
    kept, found, general = text.partition(separator)
    if not found:
        kept, general = "", text
    kept_tags = [tag for tag in (part.strip() for part in kept.split(",")) if tag]
    general_tags = [tag for tag in (part.strip() for part in general.split(",")) if tag]
    rng = rng_for(seed, visit, CAPTION)
    if shuffle:
        general_tags = [general_tags[index] for index in np.argsort(rng.random(len(general_tags)), kind="stable")]
    if tag_dropout:
        draws = rng.random(len(general_tags))
        general_tags = [tag for tag, draw in zip(general_tags, draws, strict=True) if draw >= tag_dropout]
    return ", ".join(kept_tags + general_tags)


def normal_for(shape: tuple[int, ...], seed: int, visit: int, purpose: int) -> np.ndarray:
    """Standard normal float32 of `shape`."""
    return rng_for(seed, visit, purpose).standard_normal(shape).astype(np.float32)


def noise_for(shape: tuple[int, int, int], offset: float, seed: int, visit: int) -> np.ndarray:
    """ε plus `offset` times one normal number per channel; shape (channels, height, width), float32."""
    epsilon = normal_for(shape, seed, visit, NOISE)
    return epsilon + np.float32(offset) * normal_for((shape[0], 1, 1), seed, visit, OFFSET)


def time_step_for(seed: int, visit: int) -> int:
    """Uniform in 0 … 999."""
    return int(rng_for(seed, visit, TIME).integers(0, TIME_STEPS))
