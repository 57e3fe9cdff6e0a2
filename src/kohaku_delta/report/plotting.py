"""One style for every matplotlib picture; the same figure gives the same PNG, byte for byte."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot
from matplotlib.figure import Figure

# Only matplotlib's own fonts: neither the host's fonts nor the font list cached in the home directory may matter.
font_manager.fontManager.ttflist = []
for font in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf")):
    font_manager.fontManager.addfont(font)

INK, QUIET, GOOD, BAD, LINE = "#1f2933", "#9aa5b1", "#2f7ed8", "#d9534f", "#e4e7eb"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}


def to_png(draw: Callable[[], Figure]) -> bytes:
    """The figure that `draw` makes, as PNG without date or program version."""
    style: Any = {**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure = draw()
        file = io.BytesIO()
        figure.savefig(
            file, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.3, facecolor="white"
        )
        pyplot.close(figure)
    return file.getvalue()


def thousands(axis) -> None:
    """Write an axis's ticks as 10,000."""
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
