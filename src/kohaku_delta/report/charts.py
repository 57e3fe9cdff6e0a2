"""Training curves: every finite value is drawn, and the alternative text says how many values are not finite."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kohaku_delta.report.plotting import BAD, GOOD, LINE, pyplot, thousands

COLORS = (GOOD, BAD)


@dataclass(frozen=True)
class Series:
    """Values by step, from step 0 or at `steps`."""

    name: str
    values: list[float]
    steps: list[float] | None = None


def draw_curves(series: list[Series], smooth: bool) -> Figure:
    """The series by step; `smooth` draws a moving mean over each."""
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for each, color in zip(series, COLORS, strict=False):
        values = finite(each.values)
        marker = "o" if each.steps or np.isfinite(values).sum() == 1 else None
        axes.plot(
            each.steps or range(len(values)),
            values,
            color=color,
            label=each.name,
            marker=marker,
            alpha=0.4 if smooth else 1,
            linewidth=1.2,
        )
        if smooth:
            axes.plot(moving_mean(values), color=color, linewidth=2)
    axes.set_ylim(bottom=min(0, *(np.nan_to_num(finite(each.values)).min() for each in series)))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    thousands(axes.xaxis)
    axes.grid(color=LINE)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def finite(values: list[float]) -> np.ndarray:
    """float64, NaN in place of what is not finite: a gap in the curve."""
    array = np.array(values, np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value's neighbourhood, a tenth of all values wide and narrower at the ends; NaN is left out."""
    place = np.arange(len(values))
    reach = np.minimum(max(1, len(values) // 20), np.minimum(place, place[::-1]))
    sums, counts = (np.concatenate([[0], np.cumsum(each)]) for each in (np.nan_to_num(values), np.isfinite(values)))
    window = place + reach + 1, place - reach
    with np.errstate(invalid="ignore"):
        return (sums[window[0]] - sums[window[1]]) / (counts[window[0]] - counts[window[1]])


def describe(title: str, series: list[Series]) -> str:
    """The chart in words, for the alternative text."""
    steps = series[0].steps
    span = f"{len(steps):,} models, steps {steps[0]:,.0f} to {steps[-1]:,.0f}" if steps else ""
    span = span or f"{len(series[0].values):,} steps"
    return f"{title} over {span}: " + "; ".join(map(_describe, series))


def _describe(series: Series) -> str:
    values = finite(series.values)
    known = values[np.isfinite(values)]
    if not len(known):
        return f"{series.name} has no finite value"
    lost = len(values) - len(known)
    ends = f"starts at {known[0]:.3g} and ends at {known[-1]:.3g}"
    note = f"; {lost:,} values are not finite" if lost else ""
    return f"{series.name} {ends}, between {known.min():.3g} and {known.max():.3g}{note}"
