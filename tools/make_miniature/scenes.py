"""Composes scenes together with the tags for what they show, so that tags and image agree."""

from dataclasses import dataclass, replace

from make_miniature.drawing import Figure, Scene
from make_miniature.words import (
    ARTISTS,
    BODY,
    CASTS,
    CHARACTERS,
    FACES,
    OUTDOORS,
    PLACES,
    SHAPES,
    SIMPLE,
    SIZES,
    chance,
    pick,
)

SIDES = {
    "left_side": (-0.24, 0.0),
    "right_side": (0.24, 0.0),
    "top_side": (0.0, -0.24),
    "bottom_side": (0.0, 0.24),
    "centered": (0.0, 0.0),
}
RADII = {"close-up": 0.40, "full_body": 0.28, "wide_shot": 0.17}


@dataclass(frozen=True)
class Composition:
    """The scene and its words, a list for each of danbooru's tag types."""

    scene: Scene
    general: tuple[str, ...]
    characters: tuple[str, ...] = ()
    copyrights: tuple[str, ...] = ()
    artists: tuple[str, ...] = ()


def count_words(girls, boys, others):
    """danbooru's counting: 1girl, 2girls + multiple_girls, … 6+girls; solo for one alone."""
    words = []
    for count, one in ((girls, "girl"), (boys, "boy"), (others, "other")):
        if count:
            words.append(f"1{one}" if count == 1 else f"{count if count < 6 else '6+'}{one}s")
        if count > 1:
            words.append(f"multiple_{one}s")
    if girls + boys + others == 1:
        words.append("solo")
    if boys and not girls and not others:
        words.append("male_focus")
    return words or ["no_humans"]


def standing(index: int, count: int, width: int, height: int) -> tuple[float, float, float]:
    """x, y and radius (as in Figure) of figure number `index` of `count` >= 2: side by side, in rows if the picture is
    tall.
    """
    per_row = count if width >= height or count < 4 else 2
    if height > 1.5 * width:
        per_row = 1
    row, column = divmod(index, per_row)
    rows = -(-count // per_row)
    room = min(width / per_row, height / rows)
    return (column + 0.5) / per_row, (row + 0.5) / rows, 0.36 * room / min(width, height)


def unique(words):
    return tuple(dict.fromkeys(words))


def compose(rng, width, height, *, plain=False, known=0.45) -> Composition:
    """One picture of the miniature's world.

    plain: as the parents know it: pale colours, no characters, no artists. known: how often a figure is a character.
    """
    cast = pick(rng, CASTS)
    kinds = ["girl"] * cast[0] + ["boy"] * cast[1] + ["other"] * cast[2]
    words = count_words(*cast)
    scenery = not kinds and not plain and chance(rng, 0.5)
    kinds = kinds or ([] if scenery else ["thing"])
    figures, characters, series = [], [], []
    size = pick(rng, SIZES) if len(kinds) == 1 else "full_body"
    place = pick(rng, PLACES)
    shared = pick(rng, BODY)
    uniform = chance(rng, 0.5)
    known_ones = {each: each.weight for each in CHARACTERS}
    for index, kind in enumerate(kinds):
        figure = Figure(pick(rng, SHAPES), shared if uniform else pick(rng, BODY), kind, 0.5, 0.5, RADII[size])
        if kind != "thing":
            figure = replace(figure, face=pick(rng, FACES))
        if kind in ("girl", "boy") and not plain and chance(rng, known):
            fitting = {
                each: weight
                for each, weight in known_ones.items()
                if each.girl == (kind == "girl") and each.name not in characters
            }
            if fitting:
                who = pick(rng, fitting)
                figure = replace(figure, shape=who.shape, colour=who.colour, mark=who.mark)
                characters.append(who.name)
                series.append(who.series or "original")
        if len(kinds) == 1:
            dx, dy = SIDES[place]
            figure = replace(figure, x=0.5 + dx, y=0.5 + dy)
        else:
            x, y, radius = standing(index, len(kinds), width, height)
            figure = replace(figure, x=x, y=y, radius=radius)
        figures.append(figure)
        words += [figure.shape, f"{figure.colour}_body"]
        if figure.face:
            words.append(figure.face)
        if kind == "girl":
            words.append("bow")
        if kind == "boy":
            words.append("hat")
        if figure.mark == "crown":
            words.append("crown")
    if len(figures) == 1:
        words += [size, place]
    if not figures or chance(rng, 0.3):
        background, colours = pick(rng, OUTDOORS), ("blue", "blue")
        words += ["outdoors", "scenery"] if not figures else ["outdoors"]
        words.append(background)
    else:
        background = pick(rng, SIMPLE)
        taken = {figure.colour for figure in figures}
        free = {colour: weight for colour, weight in BODY.items() if colour not in taken}
        first = pick(rng, free)
        second = pick(rng, {colour: weight for colour, weight in free.items() if colour != first})
        colours = (first, second)
        words += [background, f"{colours[0]}_background"]
        if background != "simple_background":
            words.append("two-tone_background")
    artists, style = [], ARTISTS[-1]
    if not plain:
        style = pick(rng, {each: each.weight for each in ARTISTS})
        artists = [style.name]
        if chance(rng, 0.04):
            artists.append(pick(rng, {each.name: each.weight for each in ARTISTS if each != style}))
        if not characters and chance(rng, 0.4):
            series.append("original")
    scene = Scene(width, height, background, colours, tuple(figures), style, pale=0.55 if plain else 0.0)
    return Composition(scene, unique(words), unique(characters), unique(series), unique(artists))
