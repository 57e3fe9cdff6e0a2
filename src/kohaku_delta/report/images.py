"""The pictures of the page, carried in it as data URLs, each with its content in words for readers who cannot see it.

A picture that no stage wrote is left out.
"""

import base64
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kohaku_delta.errors import UserError
from kohaku_delta.report import charts, pipeline_diagram, plotting
from kohaku_delta.report.build_files import Dataset
from kohaku_delta.report.build_summary import Build
from kohaku_delta.report.charts import Series
from kohaku_delta.units import format_duration

MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_WIDTH = 2400  # pixels: the release's preview has 8192, which no page needs
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class EmbeddedImage:
    name: str
    source: str  # data: URL
    width: int
    height: int
    alt: str
    caption: str


def preview(build: Build) -> EmbeddedImage | None:
    """Base beside final."""
    prompts = build.recipe.preview.prompts
    alt = f"Pairs of pictures, base and final model, for {len(prompts)} prompts: {'; '.join(prompts)}."
    caption = "Each prompt drawn by the base (left) and by the trained model (right), with the same noise."
    return _from_file(build.folder / "preview.png", alt, caption)


def dataset_plots(build: Build) -> list[EmbeddedImage]:
    """The plots of the statistics stage."""
    dataset = build.dataset
    texts = {
        "posts": ("What became of the selected posts.", _posts(dataset) if dataset else ""),
        "ratings": (
            "Ratings and quality tags.",
            f"Posts by rating: {_counts(dataset.ratings)}. By quality tag: {_counts(dataset.quality)}."
            if dataset
            else "",
        ),
        "years": (
            "Posts by year; the colour is the date tag.",
            "One bar per year: how many posts of that year are trained on.",
        ),
        "buckets": ("Images of each bucket.", "The table of buckets below has the same counts."),
        "tokens": (
            "How long captions are.",
            f"Captions by length in tokens: {_counts(dataset.tokens)}." if dataset else "",
        ),
        "names": (
            "The most frequent names.",
            "Bars of the most frequent artists, characters and general tags; the JSON lists have every name and count.",
        ),
    }
    folder = build.folder / "statistics"
    images = [_from_file(folder / f"{name}.png", alt or caption, caption) for name, (caption, alt) in texts.items()]
    return [image for image in images if image]


def pipeline(build: Build) -> EmbeddedImage:
    """The stages and what they read; below each name its largest output's md5, and the time it ran."""
    notes = {}
    for stage in build.stages:
        note = max(stage.outs.values(), key=lambda out: out.size).md5[:10] if stage.outs else "has not run"
        notes[stage.name] = note + (f", {format_duration(stage.record.times.seconds)}" if stage.record else "")
    content = plotting.to_png(lambda: pipeline_diagram.draw_pipeline(build.stages, notes))
    return _embed("pipeline", content, pipeline_diagram.describe(build.stages), "")


def curves(build: Build) -> list[EmbeddedImage]:
    """The training curves."""
    values = build.curves
    if not values:
        return []
    rates = [Series("U-Net", values["learning_rate_unet"]), Series("text encoders", values["learning_rate_text"])]
    drawn = [
        _chart("Loss", [Series("loss", values["loss"])], "each step, and the moving mean"),
        _chart(
            "Gradient norm",
            [Series("norm", values["gradient_norm"])],
            "before clipping: each step, and the moving mean",
        ),
        _chart("Learning rate", rates, "", smooth=False),
    ]
    return drawn + _held_out_curve(build)


def _held_out_curve(build: Build) -> list[EmbeddedImage]:
    """The held-out loss by milestone, in both conditioning forms if they differ."""
    values = build.milestones
    if not values or not np.isfinite(values["held_out_loss"]).any():
        return []
    forms = {"SDXL's form": values["held_out_loss"], "the training's form": values["held_out_loss_training"]}
    if values["held_out_loss"] == values["held_out_loss_training"]:
        del forms["the training's form"]
    series = [Series(name, losses, values["step"]) for name, losses in forms.items()]
    caption = "base, milestones and final model, on posts that were not selected"
    return [_chart("Held-out loss", series, caption, smooth=False)]


def milestones(build: Build) -> EmbeddedImage | None:
    """The preview's prompts as base, milestones and final model draw them."""
    steps = ", ".join(f"{step:,.0f}" for step in build.milestones["step"]) if build.milestones else "not known"
    alt = f"A row of pictures per prompt of the preview, one per model, after so many steps: {steps}."
    caption = "Each prompt drawn by the base, by each milestone and by the trained model, with the same noise."
    return _from_file(build.folder / "milestones.png", alt, caption)


def _chart(title: str, series: list[Series], caption: str, smooth: bool = True) -> EmbeddedImage:
    content = plotting.to_png(lambda: charts.draw_curves(series, smooth))
    return _embed(title, content, charts.describe(title, series), caption)


def _from_file(path: Path, alt: str, caption: str) -> EmbeddedImage | None:
    """The PNG at `path`, made smaller if it is very wide; None if there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    if not content.startswith(MAGIC) or len(content) < 24:
        raise UserError(f"{path} is not a PNG of at most {MAX_BYTES >> 20} MiB. Run its stage again.")
    if _size(content)[0] > MAX_WIDTH:
        return _shrink(path, content, alt, caption)
    return _embed(path.stem, content, alt, caption)


def _embed(name: str, content: bytes, alt: str, caption: str) -> EmbeddedImage:
    return EmbeddedImage(name, _data_url("png", content), *_size(content), alt, caption)


def _size(png: bytes) -> tuple[int, int]:
    return struct.unpack(">II", png[16:24])


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shrink(path: Path, content: bytes, alt: str, caption: str) -> EmbeddedImage:
    """As WebP of MAX_WIDTH."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be decoded ({error}). Run its stage again.") from None
    size = MAX_WIDTH, max(1, round(rgb.height * MAX_WIDTH / rgb.width))
    file = io.BytesIO()
    rgb.resize(size, Image.Resampling.LANCZOS).save(file, "webp", quality=86, method=4)
    return EmbeddedImage(path.stem, _data_url("webp", file.getvalue()), *size, alt, caption)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _posts(dataset: Dataset) -> str:
    return (
        f"{dataset.trained:,} of {dataset.selected:,} selected posts are trained on. "
        f"Dropped: {_counts(dataset.dropped)}. "
        f"Trained on although the metadata speaks against them: {_counts(dataset.despite)}."
    )
