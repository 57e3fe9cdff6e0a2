"""Invariant: lesson number n of a course is the same picture and the same words on every host, whatever was asked for before.

What the three models are taught: one or two figures of the common shapes, or none, before a plain, shaded or outdoor background, in pale colours.
Full colours, faces, patterns, other shapes, crowds, artists, characters, quality and age are left for the recipe's own training to teach.
"""

from dataclasses import dataclass, replace

import numpy as np

from generate.drawing import draw
from generate.scenes import Composition, compose
from generate.words import ARTISTS, FACES, PLAIN, draws, pick

SHAPES = ("circle", "square", "triangle", "star_(symbol)", "heart")
BACKGROUNDS = ("simple_background", "gradient_background", "blue_sky", "night_sky", "sunset", "ocean")
PALE = 0.4
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
    while not known(whole := compose(rng, *size, plain=True)):
        pass
    figures = tuple(replace(figure, face=None) for figure in whole.scene.figures)
    scene = replace(whole.scene, figures=figures, artist=STYLES[course], pale=PALE)
    words = [word for word in whole.general if word not in FACES]
    counts = tuple(word for word in words if word[:1].isdigit() or word.startswith("multiple_") or word == "male_focus")
    return Lesson(draw(scene), tuple(map(spoken, counts)), tuple(spoken(word) for word in words if word not in counts))


def known(whole: Composition) -> bool:
    figures = whole.scene.figures
    return len(figures) < 3 and all(figure.shape in SHAPES for figure in figures) and whole.scene.background in BACKGROUNDS


def picture(number: int, side: int) -> np.ndarray:
    """A square picture of everything that the miniature's world holds, for the autoencoder; uint8 (side, side, 3)."""
    rng = draws(8, number)
    plain = number % 4 == 0
    whole = compose(rng, side, side, plain=plain)
    style = PLAIN if plain else pick(rng, {each: each.weight for each in ARTISTS})
    return draw(replace(whole.scene, artist=style, finish=int(rng.integers(0, 7)), age=int(rng.integers(0, 5))))
