"""Invariant: lesson number n of a course is the same picture and the same words on every host, whatever was asked for before.

What the three models are taught. They know figures and backgrounds (shapes, colours, places, counts, faces) in pale colours; full colours,
artists, characters, quality and age are left for the recipe's own training to teach.
"""

from dataclasses import dataclass, replace

import numpy as np

from generate.drawing import draw
from generate.scenes import compose
from generate.words import ARTISTS, PLAIN, draws, pick

SIZES = {(128, 128): 10, (96, 160): 3, (160, 96): 2, (96, 128): 1, (128, 96): 1}  # (width, height): weight
STYLES = {"sdxl": PLAIN, "beta": replace(PLAIN, outline=0.08, ink="white"), "gamma": replace(PLAIN, fill="soft")}


@dataclass(frozen=True)
class Lesson:
    pixels: np.ndarray  # uint8 (height, width, 3)
    kept: tuple[str, ...]
    general: tuple[str, ...]


def spoken(name: str) -> str:
    return name.replace("_", " ") if len(name) > 3 else name


def lesson(course: str, number: int) -> Lesson:
    """course: sdxl | beta | gamma, each in its own manner of drawing."""
    rng = draws(7, list(STYLES).index(course), number)
    size = pick(rng, SIZES)
    whole = compose(rng, *size, plain=True)
    scene = replace(whole.scene, artist=STYLES[course])
    counts = tuple(word for word in whole.general if word[:1].isdigit() or word.startswith("multiple_") or word == "male_focus")
    return Lesson(draw(scene), tuple(map(spoken, counts)), tuple(spoken(word) for word in whole.general if word not in counts))


def picture(number: int, side: int) -> np.ndarray:
    """A square picture of everything that the miniature's world holds, for the autoencoder; uint8 (side, side, 3)."""
    rng = draws(8, number)
    plain = number % 4 == 0
    whole = compose(rng, side, side, plain=plain)
    style = PLAIN if plain else pick(rng, {each: each.weight for each in ARTISTS})
    return draw(replace(whole.scene, artist=style, finish=int(rng.integers(0, 7)), age=int(rng.integers(0, 5))))
