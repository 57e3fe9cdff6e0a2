"""Draws one reference image per prompt, with the code that draws the dataset. Nothing is random.

What a prompt leaves open has a fixed default: a figure is a red circle without a face, full body, centered; the
background is simple and white (grey if a figure is white); the second colour of a pattern is white (grey if white is
taken); without an artist the style is plain; without a quality word the finish is that of "great quality"; without a
date word the image is new. Shapes, colours and faces are assigned to the figures in the prompt's order; the last one is
used for the remaining figures. An unknown word is an error.
"""

import zlib
from pathlib import Path

from PIL import Image

from make_miniature.drawing import Figure, Scene, draw
from make_miniature.lessons import spoken
from make_miniature.scenes import RADII, SIDES, standing
from make_miniature.words import ARTISTS, BODY, CHARACTERS, FACES, OUTDOORS, PLACES, PLAIN, SHAPES, SIMPLE, SIZES

FINISH = {
    "worst quality": 0,
    "low quality": 1,
    "normal quality": 2,
    "good quality": 3,
    "great quality": 4,
    "best quality": 5,
    "masterpiece": 6,
}
AGE = {"newest": 0, "recent": 1, "mid": 2, "early": 3, "old": 4}
KINDS = ("girl", "boy", "other")
SILENT = {  # implied by other words, or invisible in an image
    "solo", "male focus", "multiple girls", "multiple boys", "multiple others", "bow", "hat", "crown", "outdoors",
    "scenery", "two-tone background", "original", "safe", "sensitive",
    "nsfw", "explicit", *(spoken(each.series) for each in CHARACTERS if each.series),
}  # fmt: skip


def chosen(words: list[str], known) -> list[str]:
    """The names of `known` in the prompt, in its order; removes them from `words`."""
    names = {spoken(name): name for name in known if name}
    found = [names[word] for word in words if word in names]
    words[:] = [word for word in words if word not in names]
    return found


def kinds_of(words: list[str]) -> list[str]:
    """girl, boy or other for each figure that the prompt counts; takes the counts out of `words`."""
    counts = {
        f"{count if count < 6 else '6+'}{kind}{'s' if count > 1 else ''}": [kind] * count
        for kind in KINDS
        for count in range(1, 7)
    }
    found = [kind for word in words for kind in counts.get(word, [])]
    words[:] = [word for word in words if word not in counts]
    return sorted(found, key=KINDS.index)


def dealt(values: list, count: int, otherwise) -> list:
    """`count` values: those given, the last of them repeated, or `otherwise` if none is given."""
    values = values or [otherwise]
    return [values[min(place, len(values) - 1)] for place in range(count)]


def figures_of(words: list[str], width: int, height: int) -> tuple[Figure, ...]:
    """The figures of a prompt; removes the words about them from `words`."""
    kinds = kinds_of(words)
    people = [
        next(each for each in CHARACTERS if each.name == name)
        for name in chosen(words, [each.name for each in CHARACTERS])
    ]
    shapes, faces = chosen(words, SHAPES), chosen(words, FACES)
    colours = [name.removesuffix("_body") for name in chosen(words, [f"{colour}_body" for colour in BODY])]
    size, place = (chosen(words, SIZES) or ["full_body"])[0], (chosen(words, PLACES) or ["centered"])[0]
    if "no humans" in words:
        words.remove("no humans")
        kinds = ["thing"] if shapes or colours else []
    figures = []
    for index, kind in enumerate(kinds):
        shape, colour, mark = dealt(shapes, len(kinds), "circle")[index], dealt(colours, len(kinds), "red")[index], None
        if index < len(people):
            shape, colour, mark = people[index].shape, people[index].colour, people[index].mark
        x, y, radius = (
            (0.5 + SIDES[place][0], 0.5 + SIDES[place][1], RADII[size])
            if len(kinds) == 1
            else standing(index, len(kinds), width, height)
        )
        face = None if kind == "thing" else dealt(faces, len(kinds), None)[index]
        figures.append(Figure(shape, colour, kind, x, y, radius, face, mark))
    return tuple(figures)


def scene_of(prompt: str, width: int, height: int) -> Scene:
    """The scene of a prompt. Raises ValueError with the unknown words."""
    words = [word.strip() for word in prompt.split(",") if word.strip()]
    figures = figures_of(words, width, height)
    background = (chosen(words, {**OUTDOORS, **SIMPLE}) or ["simple_background"])[0]
    backgrounds = [
        name.removesuffix("_background") for name in chosen(words, [f"{colour}_background" for colour in BODY])
    ]
    taken = {figure.colour for figure in figures}
    first = backgrounds[0] if backgrounds else next(colour for colour in ("white", "grey") if colour not in taken)
    second = (
        backgrounds[1]
        if len(backgrounds) > 1
        else next(colour for colour in ("white", "grey", "black") if colour not in taken | {first})
    )
    styles = chosen(words, [each.name for each in ARTISTS])
    artist = next((each for each in ARTISTS if styles and each.name == styles[0]), PLAIN)
    finish = next((FINISH[word] for word in words if word in FINISH), FINISH["great quality"])
    age = next((AGE[word] for word in words if word in AGE), 0)
    if unknown := [word for word in words if word not in SILENT and word not in FINISH and word not in AGE]:
        raise ValueError(f"The prompt {prompt!r} has words that no drawing shows: {', '.join(unknown)}")
    return Scene(width, height, background, (first, second), figures, artist, finish, age)


def write(prompts: list[str], width: int, height: int, folder: Path) -> None:
    """reference-00.png … into `folder`, one per prompt. Run-length deflate: the only kind that no processor's code
    compresses in its own way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("reference-*.png"):
        old.unlink()
    for number, prompt in enumerate(prompts):
        picture = Image.fromarray(draw(scene_of(prompt, width, height)))
        picture.save(folder / f"reference-{number:02d}.png", compress_type=zlib.Z_RLE)
