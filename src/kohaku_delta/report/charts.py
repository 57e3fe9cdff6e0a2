"""Invariant: a curve is drawn from every value it has: where steps share a column, their range is shaded and their mean
drawn; nothing is left out unsaid.

Pictures are SVG text of fixed precision, sized for a phone; colours are the page's (classes), so that they follow its
dark mode.
"""

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 24
COLUMNS = 240
TICKS = 4


@dataclass(frozen=True)
class Series:
    name: str
    values: list[float]


def line(title: str, series: list[Series], smooth: bool = False) -> Markup:
    """Values by step, from 0. `smooth`: a moving mean is drawn over them."""
    count = max(len(each.values) for each in series)
    finite = [value for each in series for value in each.values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max(finite, default=1.0)
    high = high if high > low else low + 1
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * step / max(count - 1, 1):.1f}"

    def y(value: float) -> str:
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low):.1f}"

    parts = [f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>' for tick in ticks]
    parts += [f'<text x="{LEFT - 6}" y="{y(tick)}" dy="0.33em" text-anchor="end">{tick:.3g}</text>' for tick in ticks]
    steps = [tick for tick in _ticks(0, max(count - 1, 1)) if tick == int(tick) and tick < count]
    for tick in steps:
        parts.append(
            f'<text x="{x(tick)}" y="{HEIGHT - 7}" text-anchor="{"middle" if tick < 0.97 * count else "end"}">{tick:,.0f}</text>'
        )
    for number, each in enumerate(series):
        columns = _columns(each.values)
        if any(top > bottom for _, bottom, _, top in columns):
            edge = [(step, top) for step, _, _, top in columns] + [
                (step, bottom) for step, bottom, _, _ in reversed(columns)
            ]
            parts.append(
                f'<path class="range s{number}" d="M{" ".join(f"{x(step)},{y(value)}" for step, value in edge)}Z"/>'
            )
        means = [(step, mean) for step, _, mean, _ in columns]
        for kind, points in (("raw", means), ("mean", _moving(means))) if smooth else (("mean", means),):
            parts.append(
                f'<polyline class="{kind} s{number}" points="{" ".join(f"{x(step)},{y(value)}" for step, value in points)}"/>'
            )
    label = f"{title} over {count:,} steps: " + "; ".join(_said(each) for each in series)
    return _svg(HEIGHT, label, parts)


def _svg(height: int, label: str, parts: list[str]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("".join(parts))
    )


def _said(series: Series) -> str:
    """The curve for who does not see it."""
    values = [value for value in series.values if math.isfinite(value)]
    if not values:
        return f"{series.name} has no finite value"
    lost = len(series.values) - len(values)
    told = f"{series.name} starts at {values[0]:.3g}, ends at {values[-1]:.3g}, lies between {min(values):.3g} and {max(values):.3g}"
    return told + (f", {lost:,} values are not finite" if lost else "")


def _ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers from low to beyond high."""
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * each for each in (1, 2, 2.5, 5, 10) if unit * each >= rough * 0.999)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step * 0.999) + 1)]


def _columns(values: list[float]) -> list[tuple[float, float, float, float]]:
    """(step, least, mean, most) of each column of steps, at most COLUMNS; values that are not finite are gaps."""
    width = max(1, math.ceil(len(values) / COLUMNS))
    found = []
    for start in range(0, len(values), width):
        piece = [value for value in values[start : start + width] if math.isfinite(value)]
        if piece:
            found.append(
                (
                    start + (len(values[start : start + width]) - 1) / 2,
                    min(piece),
                    math.fsum(piece) / len(piece),
                    max(piece),
                )
            )
    return found


def _moving(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each point's neighbourhood, a tenth of all points wide and narrower at the ends."""
    half = max(1, len(points) // 20)
    found = []
    for place, (step, _) in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)
        near = [value for _, value in points[place - reach : place + reach + 1]]
        found.append((step, math.fsum(near) / len(near)))
    return found


def bars(title: str, rows: list[tuple[str, int]]) -> Markup:
    """A bar a row, with its name before it and its count behind it."""
    most, pitch, left, right = max([count for _, count in rows] + [1]), 20, 92, 64
    parts = []
    for number, (name, count) in enumerate(rows):
        middle, length = pitch * number + pitch / 2, (WIDTH - left - right) * count / most
        parts.append(f'<text x="{left - 8}" y="{middle:.1f}" dy="0.33em" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar" x="{left}" y="{middle - 6:.1f}" width="{max(length, 1):.1f}" height="12" rx="2"/>'
        )
        parts.append(
            f'<text class="count" x="{left + max(length, 1) + 6:.1f}" y="{middle:.1f}" dy="0.33em">{count:,}</text>'
        )
    label = f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in rows)
    return _svg(pitch * max(len(rows), 1), label, parts)
