"""Invariant: everything random about a visit is a function of (seed, visit): any step can be computed alone, in any
order.

A counter-based generator (Philox) keyed by (seed, visit) gives each purpose a stream of its own. Numbers are drawn on
the CPU in float64 and rounded once, so a GPU and a laptop see the same noise.
"""

import numpy as np

CAPTION, LATENT, NOISE, OFFSET, TIME = range(5)
TIME_STEPS = 1000


def rng_for(seed: int, visit: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose of one visit."""
    return np.random.Generator(np.random.Philox(key=[seed, visit], counter=[0, 0, 0, purpose]))


def caption_for(text: str, separator: str, shuffle: bool, tag_dropout: float, seed: int, visit: int) -> str:
    """What is tokenised: the kept part as it is, then the general part shuffled and with a share of its tags dropped.

    As sd-scripts does with keep_tokens_separator: both parts are cut at commas, the separator itself disappears. A
    caption without a separator has no kept part.
    """
    kept, found, general = text.partition(separator)
    if not found:
        kept, general = "", text
    fixed = [tag for tag in (each.strip() for each in kept.split(",")) if tag]
    flexible = [tag for tag in (each.strip() for each in general.split(",")) if tag]
    numbers = rng_for(seed, visit, CAPTION)
    if shuffle:
        flexible = [flexible[index] for index in np.argsort(numbers.random(len(flexible)), kind="stable")]
    if tag_dropout:
        flexible = [tag for tag, number in zip(flexible, numbers.random(len(flexible))) if number >= tag_dropout]
    return ", ".join(fixed + flexible)


def normal_for(shape: tuple[int, ...], seed: int, visit: int, purpose: int) -> np.ndarray:
    """Standard normal float32 of `shape`."""
    return rng_for(seed, visit, purpose).standard_normal(shape).astype(np.float32)


def noise_for(shape: tuple[int, int, int], offset: float, seed: int, visit: int) -> np.ndarray:
    """ε + noise offset · one number a channel; shape (channels, height, width), float32."""
    drawn = normal_for(shape, seed, visit, NOISE)
    return drawn + np.float32(offset) * normal_for((shape[0], 1, 1), seed, visit, OFFSET)


def time_step_for(seed: int, visit: int) -> int:
    """Uniform in 0…999."""
    return int(rng_for(seed, visit, TIME).integers(0, TIME_STEPS))
