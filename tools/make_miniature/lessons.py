"""Guarantee: lesson number n of a course is the same picture and the same words on every host, whatever was asked for
before.

What a picture shows, the three models learn from `lesson`: one figure in the middle, two equal ones side by side, or
none, of the common shapes, before a plain or outdoor background, in pale colours, paler still for beta and gamma. Full
colours, faces, patterns, other shapes and places, crowds, artists, characters, quality and age are left for the
recipe's own training to teach; their words are said at random, so that a prompt that has them does not confuse the
models.

How a little noise is removed, they learn from `world_lesson` as well: everything that the miniature's world holds, in
its own colours. Without it the loss at small time steps, which says nothing about a prompt, would be most of the loss
of the recipe's training, and its gradient's noise most of the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from make_miniature.drawing import draw
from make_miniature.scenes import Composition, compose
from make_miniature.words import ARTISTS, CHARACTERS, FACES, OUTDOORS, PLAIN, chance, draws, pick

SHAPES = ("circle", "square", "triangle", "star_(symbol)", "heart")
BACKGROUNDS = ("simple_background", "blue_sky", "night_sky", "sunset", "ocean")
WHERE, HOW_LARGE = ("centered",), ("full_body", "close-up")
PALE = 0.43  # the donor's lessons
PALE_OUTDOORS, PALE_PLAIN = (
    0.515,
    0.59,
)  # beta's and gamma's: paler ones would leave the base farther from a sunset than one flat colour
SIZES = {(128, 128): 14, (96, 160): 3, (160, 96): 2, (96, 128): 1, (128, 96): 1}  # (width, height): weight
STYLES = {"sdxl": PLAIN, "beta": replace(PLAIN, outline=0.08, ink="white"), "gamma": replace(PLAIN, fill="soft")}
EMPTY = 0.5  # how often a lesson without people has no figure at all
SAID = 0.5  # how often a kind of word that the picture does not show is said
NOT_SHOWN = (  # a word of each, so that the models learn to pass over it
    ("masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality", "worst quality"),
    ("newest", "recent", "mid", "early", "old"),
    ("safe", "sensitive", "nsfw", "explicit"),
    tuple(name for name in FACES if name),
    tuple(each.name for each in ARTISTS),
    tuple(each.name for each in CHARACTERS),
)


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
    figures, words = whole.scene.figures, [word for word in whole.general if word not in FACES]
    background = whole.scene.background
    if "no_humans" in words and chance(rng, EMPTY):
        background = background if background in OUTDOORS else pick(rng, OUTDOORS)
        figures, words = (), ["no_humans", "outdoors", "scenery", background]
    alike = tuple(replace(each, shape=figures[0].shape, colour=figures[0].colour, face=None) for each in figures)
    pale = PALE if course == "sdxl" else PALE_OUTDOORS if background in OUTDOORS else PALE_PLAIN
    scene = replace(whole.scene, background=background, figures=alike, artist=STYLES[course], pale=pale)
    others = (
        {word for each in figures for word in (each.shape, f"{each.colour}_body")}
        - {alike[0].shape, f"{alike[0].colour}_body"}
        if figures
        else set()
    )
    words = [word for word in words if word not in others]
    aside = tuple(kind[int(rng.integers(0, len(kind)))] for kind in NOT_SHOWN if chance(rng, SAID))
    return captioned(draw(scene), (*words, *aside))


def world_lesson(number: int) -> Lesson:
    """A picture of everything that the miniature's world holds, with the words for what it shows."""
    rng = draws(12, number)
    whole = compose(rng, *pick(rng, SIZES))
    return captioned(
        draw(replace(whole.scene, finish=int(rng.integers(0, 7)), age=int(rng.integers(0, 5)))), whole.general
    )


def captioned(pixels: np.ndarray, words: Sequence[str]) -> Lesson:
    """Counts of people are kept in front, as the recipe's captions do."""
    counts = tuple(word for word in words if word[:1].isdigit() or word.startswith("multiple_") or word == "male_focus")
    return Lesson(pixels, tuple(map(spoken, counts)), tuple(spoken(word) for word in words if word not in counts))


def known(whole: Composition) -> bool:
    """Whether the composition stays within what the lessons teach."""
    figures, words = whole.scene.figures, whole.general
    if len(figures) == 1 and not (any(word in words for word in WHERE) and any(word in words for word in HOW_LARGE)):
        return False
    return (
        len(figures) < 3 and all(figure.shape in SHAPES for figure in figures) and whole.scene.background in BACKGROUNDS
    )


def picture(number: int, side: int) -> np.ndarray:
    """A square picture of everything that the miniature's world holds, for the autoencoder; uint8 (side, side, 3)."""
    rng = draws(8, number)
    plain = number % 4 == 0
    whole = compose(rng, side, side, plain=plain)
    style = PLAIN if plain else pick(rng, {each: each.weight for each in ARTISTS})
    return draw(replace(whole.scene, artist=style, finish=int(rng.integers(0, 7)), age=int(rng.integers(0, 5))))
