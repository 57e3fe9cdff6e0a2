"""The miniature's vocabulary: each word names something visible in the image, or is one of danbooru's meta tags.

Images show figures (a shape, a colour, perhaps a face) before a background. Tags are written as on danbooru.
"""

from dataclasses import dataclass

import numpy as np

GENERAL, ARTIST, CHARACTER, COPYRIGHT, META = range(5)


def draws(*key: int) -> np.random.Generator:
    """The generator of one thing: counter-based, keyed by what the thing is, so that nothing depends on what was drawn
    before.
    """
    return np.random.Generator(
        np.random.Philox(key=[key[0], sum(part << (40 * place) for place, part in enumerate(key[1:])) % 2**64])
    )


def pick(rng: np.random.Generator, weighted: dict):
    """One key of {key: weight}."""
    mark = float(rng.random()) * sum(weighted.values())
    for word, weight in weighted.items():
        mark -= weight
        if mark < 0:
            return word
    return word


def chance(rng: np.random.Generator, probability: float) -> bool:
    return float(rng.random()) < probability


COLOURS = {
    "red": (222, 44, 44),
    "orange": (244, 138, 24),
    "yellow": (248, 214, 48),
    "green": (44, 168, 72),
    "blue": (48, 92, 224),
    "purple": (142, 60, 196),
    "pink": (246, 122, 184),
    "brown": (128, 80, 46),
    "aqua": (56, 202, 212),
    "black": (36, 36, 44),
    "white": (246, 246, 246),
    "grey": (176, 176, 180),
}
BODY = {
    "red": 5,
    "orange": 3,
    "yellow": 4,
    "green": 4,
    "blue": 5,
    "purple": 3,
    "pink": 3,
    "brown": 2,
    "aqua": 2,
    "black": 2,
    "white": 2,
}
SHAPES = {
    "circle": 6,
    "square": 5,
    "triangle": 5,
    "star_(symbol)": 4,
    "heart": 4,
    "diamond_(shape)": 3,
    "hexagon": 2,
    "crescent": 2,
    "ring": 2,
}
PLACES = {"centered": 4, "left_side": 3, "right_side": 3, "top_side": 2, "bottom_side": 2}
SIZES = {"close-up": 3, "full_body": 5, "wide_shot": 2}
FACES = {"smile": 6, ":o": 2, "^_^": 2, "o_o": 2, ":<": 1, "=_=": 1, None: 2}
SIMPLE = {
    "simple_background": 5,
    "gradient_background": 2,
    "striped_background": 2,
    "polka_dot_background": 1,
    "checkered_background": 1,
}
OUTDOORS = {"blue_sky": 3, "night_sky": 2, "sunset": 2, "ocean": 2}

# What can be counted: danbooru's special tags, with (girls, boys, others).
CASTS = {
    (1, 0, 0): 46,
    (0, 1, 0): 16,
    (0, 0, 1): 6,
    (2, 0, 0): 9,
    (1, 1, 0): 6,
    (0, 2, 0): 3,
    (3, 0, 0): 3,
    (0, 0, 2): 1,
    (2, 1, 0): 1,
    (4, 0, 0): 1,
    (0, 3, 0): 1,
    (6, 0, 0): 0.5,
    (5, 0, 0): 0.5,
    (0, 0, 0): 12,
}


@dataclass(frozen=True)
class Artist:
    """A drawing style. outline: part of the figure's radius; fill: how bodies are painted; saturation and light: the
    palette.
    """

    name: str
    weight: float
    outline: float = 0.0
    ink: str = "black"
    fill: str = "flat"
    saturation: float = 1.0
    light: float = 0.0


ARTISTS = (
    Artist("inkwell_(artist)", 10, outline=0.14),
    Artist("soft_kumo", 9, fill="soft", light=0.15),
    Artist("dot_matrix", 7, fill="dots"),
    Artist("neon_fox", 6, outline=0.10, ink="aqua", saturation=1.4, light=-0.1),
    Artist("grey_heron", 5, outline=0.06, saturation=0.0),
    Artist("hatch_owl", 5, fill="hatch", outline=0.05),
    Artist("white_line", 4, outline=0.16, ink="white"),
    Artist("pastel_bun", 4, saturation=0.6, light=0.35),
    Artist("midnight_cat", 3, light=-0.35, outline=0.05),
    Artist("glass_bell", 2, fill="soft", outline=0.08, ink="white", saturation=1.2),
    Artist("sepia_(studio)", 1, saturation=0.25, light=0.05, outline=0.08, ink="brown"),
    Artist("o-o", 0.5, fill="dots", outline=0.12),
    Artist("anon_77", 0.3),
)
PLAIN = Artist("", 0)


@dataclass(frozen=True)
class Character:
    """A fixed shape and colour with a mark on it, from one series (or none)."""

    name: str
    weight: float
    girl: bool
    shape: str
    colour: str
    mark: str
    series: str | None


CHARACTERS = (
    Character("marumi_(shape_quest)", 9, True, "circle", "red", "cross", "shape_quest"),
    Character("kakuta_(shape_quest)", 7, False, "square", "blue", "band", "shape_quest"),
    Character("hoshiko_(shape_quest)", 6, True, "star_(symbol)", "yellow", "dot", "shape_quest"),
    Character("princess_hex", 5, True, "hexagon", "purple", "crown", "polygon_academy"),
    Character("sankaku_kun", 4, False, "triangle", "green", "band", "polygon_academy"),
    Character("dia_(polygon_academy)", 3, True, "diamond_(shape)", "aqua", "dot", "polygon_academy"),
    Character("heartling", 6, True, "heart", "pink", "crown", "heart_&_moon"),
    Character("luna_(heart_&_moon)", 4, True, "crescent", "white", "dot", "heart_&_moon"),
    Character("ringo_(heart_&_moon)", 2, True, "ring", "orange", "cross", "heart_&_moon"),
    Character("blocky", 2, False, "square", "brown", "cross", None),
    Character("x-1", 1, False, "triangle", "black", "crown", "color_wars!!"),
    Character("the_last_circle", 0.5, True, "circle", "white", "crown", "color_wars!!"),
)

# Words about the file. Some survive the caption's filter, some do not.
META_WORDS = {
    "highres": 40,
    "absurdres": 20,
    "commentary": 9,
    "commentary_request": 14,
    "english_commentary": 6,
    "partial_commentary": 2,
    "translated": 4,
    "translation_request": 6,
    "partially_translated": 1,
    "bad_id": 8,
    "bad_pixiv_id": 6,
    "bad_twitter_id": 4,
    "bad_link": 2,
    "md5_mismatch": 3,
    "resolution_mismatch": 1,
    "revision": 2,
    "third-party_edit": 1,
    "scan": 3,
    "traditional_media": 3,
    "watercolor_(medium)": 2,
    "photoshop_(medium)": 2,
    "sound": 0.5,
    "has_audio": 0.5,
    "artist_request": 2,
    "character_request": 2,
    "official_art": 3,
    "commission": 3,
    "duplicate": 1,
    "jpeg_artifacts": 1,
    "lowres": 2,
    "wallpaper": 1,
    "tagme": 1,
}
