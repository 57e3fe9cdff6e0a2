"""Invariant: every picture of the page is told in words too, from the same figures; a picture that no stage wrote is
left out.
"""

from kohaku_delta.report import embedded_image
from kohaku_delta.report.build_summary import Build
from kohaku_delta.report.embedded_image import EmbeddedImage
from kohaku_delta.report.stage_outputs import Dataset

FOLDER = "statistics"  # of the build: where the statistics stage puts its plots


def preview(build: Build) -> EmbeddedImage | None:
    """Base beside final."""
    prompts = "; ".join(build.recipe.preview.prompts)
    return embedded_image.embed_image(
        build.folder / "preview.png",
        f"Pairs of pictures, base and final model, for {len(build.recipe.preview.prompts)} prompts: {prompts}.",
    )


def dataset(build: Build) -> list[tuple[EmbeddedImage, str]]:
    """The statistics stage's pictures, with a line under each."""
    known = build.dataset
    told = {
        "posts": ("What became of the selected posts.", _posts(known) if known else ""),
        "ratings": (
            "Ratings and quality tags.",
            f"Posts by rating: {_counts(known.ratings)}. By quality tag: {_counts(known.quality)}." if known else "",
        ),
        "years": (
            "Posts by year; the colour is the date tag.",
            "A bar a year: how many posts of that year are trained on.",
        ),
        "buckets": ("Images of each bucket.", _buckets(build.buckets) if build.buckets else ""),
        "tokens": (
            "How long captions are.",
            f"Captions by length in tokens: {_counts(known.tokens)}." if known else "",
        ),
        "names": (
            "The most frequent names.",
            "Bars of the most frequent artists, characters and general tags; the JSON lists have every name and its count.",
        ),
    }
    found = [
        (embedded_image.embed_image(build.folder / FOLDER / f"{name}.png", alt or text), text)
        for name, (text, alt) in told.items()
    ]
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
    return (
        f"{len(sizes)} buckets; the fullest: "
        + ", ".join(f"{width} × {height} with {count:,} images" for width, height, count in most)
        + "."
    )
