"""Invariant: every picture of the page is told in words too, from the same figures; a picture that no stage wrote is left out."""

from kohaku_delta.report import picture
from kohaku_delta.report.build import Build
from kohaku_delta.report.outs import Dataset
from kohaku_delta.report.picture import Picture

FOLDER = "report"  # of the build: where the report stage puts its pictures


def preview(build: Build) -> Picture | None:
    """Base beside final."""
    prompts = "; ".join(build.recipe.preview.prompts)
    return picture.read(build.folder / "preview.png", f"Pairs of pictures, base and final model, for {len(build.recipe.preview.prompts)} prompts: {prompts}.")


def dataset(build: Build) -> list[tuple[Picture, str]]:
    """The report stage's pictures, with a line under each."""
    known = build.dataset
    told = {
        "posts": ("What became of the selected posts.", _posts(known) if known else ""),
        "ratings": ("Ratings and quality tags.", f"Posts by rating: {_counts(known.ratings)}. By quality tag: {_counts(known.quality)}." if known else ""),
        "years": ("Posts by year; the colour is the date tag.", "A bar a year: how many posts of that year are trained on."),
        "buckets": ("Images of each bucket.", _buckets(build.buckets) if build.buckets else ""),
        "tokens": ("How long captions are.", f"Captions by length in tokens: {_counts(known.tokens)}." if known else ""),
        "names": ("The most frequent names.", "Bars of the most frequent artists, characters and general tags; the JSON lists have every name and its count."),
    }
    found = [(picture.read(build.folder / FOLDER / f"{name}.png", alt or text), text) for name, (text, alt) in told.items()]
    return [(each, text) for each, text in found if each]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _posts(known: Dataset) -> str:
    return (
        f"{known.trained:,} of {known.selected:,} selected posts are trained on. Dropped: {_counts(known.dropped)}. "
        f"Trained on although the metadata speaks against them: {_counts(known.despite)}."
    )


def _buckets(sizes: list[list[int]]) -> str:
    most = sorted(sizes, key=lambda size: -size[2])[:3]
    return f"{len(sizes)} buckets; the fullest: " + ", ".join(f"{width} × {height} with {count:,} images" for width, height, count in most) + "."
