"""The plots of the dataset. The same figures give the same bytes; each plot's title says what it shows."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from kohaku_delta import atomic_files
from kohaku_delta.params import Caption, PublishedDataset
from kohaku_delta.report.plotting import BAD, GOOD, INK, LINE, QUIET, pyplot, thousands, to_png

LANDSCAPE = "#7ba0d8"
PERIODS = ("#c3cfe2", "#9fb8dd", "#7ba0d8", "#5789d3", "#3372ce", "#1c5bb0")  # one colour per date tag
LONGEST_NAME = 30  # characters


def draw_plots(
    figures: dict, caption: Caption, max_tokens: int, published: PublishedDataset | None, folder: Path
) -> list[str]:
    """Write every plot into `folder` and return the file names.

    figures: the counts of dataset_statistics; max_tokens: the longest caption that the trainer reads.
    """
    plots = {
        "posts.png": lambda: _posts(figures),
        "ratings.png": lambda: _ratings(figures, caption),
        "years.png": lambda: _years(figures, caption),
        "buckets.png": lambda: _buckets(figures, published),
        "names.png": lambda: _names(figures),
        "tokens.png": lambda: _tokens(figures, max_tokens),
    }
    for name, plot in plots.items():
        content = to_png(plot)
        with atomic_files.atomic_write(folder / name) as file:
            file.write(content)
    return list(plots)


def _share(part: int, whole: int) -> str:
    """A count and its percentage, with a second decimal below 0.1 %."""
    return f"{part:,} ({100 * part / max(whole, 1):.{1 if 1000 * part >= whole else 2}f} %)" if part else "0"


def _bars(axes, names: list[str], values: list[int], labels: list[str], color) -> None:
    """Horizontal bars, the first one at the top, each followed by its label."""
    rows = np.arange(len(names))[::-1]
    axes.barh(rows, values, color=color, height=0.72)
    for row, value, label in zip(rows, values, labels, strict=True):
        axes.text(value + max([*values, 1]) * 0.012, row, label, va="center", fontsize=10)
    axes.set_yticks(rows, names)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(0, max([*values, 1]) * 1.25)
    axes.set_ylim(-0.6, max(len(names), 1) - 0.4)


def _count_axis(axes) -> None:
    """The y axis of a bar chart of counts."""
    thousands(axes.yaxis)
    axes.yaxis.grid(color=LINE)
    axes.set_axisbelow(True)


def _posts(figures: dict) -> Figure:
    selected, trained, dropped, despite = (figures[name] for name in ("selected", "trained", "dropped", "despite"))
    rows = [max(1, len(dropped)), max(1, len(despite))]
    figure, (overview, reasons, kept) = pyplot.subplots(
        3,
        1,
        figsize=(10, 3.2 + 0.42 * sum(rows)),
        height_ratios=[1.6, *rows],
        layout=ConstrainedLayoutEngine(hspace=0.08),
    )
    overview.barh([0], [trained], color=GOOD)
    overview.barh([0], [selected - trained], left=[trained], color=BAD)
    overview.set_xlim(0, max(selected, 1))
    overview.axis("off")
    overview.set_title(f"{_share(trained, selected)} of {selected:,} selected posts are trained on")
    overview.text(trained / 2, 0, f"trained {trained:,}", ha="center", va="center", color="white", fontweight="bold")
    overview.text(selected, -0.62, f"dropped {selected - trained:,}", ha="right", color=BAD, fontweight="bold")
    for axes, counts, title, color in (
        (reasons, dropped, "why the others are dropped", BAD),
        (kept, despite, "trained on although the metadata speaks against them: their file is in a tar", QUIET),
    ):
        axes.set_title(title, fontsize=12)
        total = sum(counts.values())
        labels = [_share(count, total) for count in counts.values()]
        _bars(axes, list(counts) or ["none"], list(counts.values()) or [0], labels or [""], color)
    return figure


def _ratings(figures: dict, caption: Caption) -> Figure:
    counts = np.array(figures["ratings"])
    ratings = [", ".join(words) for words in caption.ratings.values()] + ["no rating"]
    qualities = [*caption.quality, "no quality tag"]
    if not counts[-1].any():
        counts, ratings = counts[:-1], ratings[:-1]
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals[:, None], 1)
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.75 * len(ratings)), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        label = f"{count:,}\n{100 * shares[row, column]:.0f} %" if count else "·"
        color = "white" if shares[row, column] > 0.3 else INK
        axes.text(column, row, label, ha="center", va="center", color=color, fontsize=10)
    labels = [f"{name}\n{_share(int(total), int(counts.sum()))}" for name, total in zip(ratings, totals, strict=True)]
    axes.set_xticks(range(len(qualities)), [name.replace(" ", "\n") for name in qualities])
    axes.set_yticks(range(len(ratings)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("quality of each rating's posts")
    return figure


def _years(figures: dict, caption: Caption) -> Figure:
    years = {year: count for year, count in figures["years"].items() if year}
    unreadable = figures["years"].get(0, 0)
    # One wrong date must not stretch the axis: at most five years beyond the date tags are shown.
    first = max(min([*years, caption.first_year]), caption.first_year - 5)
    last = min(max([*years, *caption.years]), max(caption.years) + 5)
    outside = sum(count for year, count in years.items() if not first <= year <= last)
    figure, axes = pyplot.subplots(figsize=(11, 4.6), layout="constrained")
    ends = [caption.first_year - 1, *caption.years]
    names = [f"before {caption.first_year}: {caption.before_first_year or 'no tag'}", *caption.years.values(), "no tag"]
    in_legend = set()
    for year in range(first, last + 1):
        period, count = int(np.searchsorted(ends, year)), years.get(year, 0)
        label = names[period] if count and period not in in_legend else None
        in_legend |= {period} if count else set()
        color = PERIODS[min(period, len(PERIODS) - 1)] if period < len(ends) else QUIET
        axes.bar(year, count, color=color, width=0.82, label=label)
    axes.set_xticks(range(first, last + 1), [str(year) for year in range(first, last + 1)], rotation=60)
    _count_axis(axes)
    if in_legend:
        axes.legend(title="date tag", frameon=False, loc="upper left")
    notes = [f"; {unreadable:,} unreadable dates"] if unreadable else []
    notes += [f"; {outside:,} posts of other years are not shown"] if outside else []
    axes.set_title("posts of each year" + "".join(notes))
    return figure


def _buckets(figures: dict, published: PublishedDataset | None) -> Figure:
    sizes = [(width, height) for width, height, _ in figures["buckets"]]
    counts = [count for _, _, count in figures["buckets"]]
    figure, axes = pyplot.subplots(figsize=(max(8, 0.17 * len(sizes) + 2), 5.4), layout="constrained")
    colors = [GOOD if width < height else INK if width == height else LANDSCAPE for width, height in sizes]
    axes.bar(range(len(sizes)), counts, color=colors, width=0.82)
    axes.set_yscale("log")
    axes.set_ylim(0.7, max([*counts, 1]) * 6)  # room for the legend
    labels = [f"{width} × {height}" for width, height in sizes]
    axes.set_xticks(range(len(sizes)), labels, rotation=90, fontsize=7 if len(sizes) > 50 else 10)
    _count_axis(axes)
    axes.set_xlim(-0.8, len(sizes) - 0.2)
    handles: list = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (GOOD, INK, LANDSCAPE)]
    names = ["portrait", "square", "landscape"]
    if published is not None:
        known = [
            (sizes.index((width, height)), count)
            for width, height, count in published.buckets
            if (width, height) in sizes
        ]
        columns, heights = [column for column, _ in known], [count for _, count in known]
        handles.append(axes.scatter(columns, heights, color=BAD, s=26, zorder=3))
        names.append(f"published ({len(published.buckets)} buckets are known)")
    axes.legend(handles, names, frameon=False, loc="upper left", ncols=4)
    steps = f"{figures['micro_batches']:,} micro-batches, {figures['steps']:,} steps"
    axes.set_title(f"images of each of {len(sizes)} buckets: {steps}")
    return figure


def _names(figures: dict) -> Figure:
    kinds = {"artists": GOOD, "characters": LANDSCAPE, "general": QUIET}
    rows = max([len(figures[kind]) for kind in kinds] + [1])
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 1.2 + 0.32 * rows), layout="constrained")
    for axes, (kind, color) in zip(panels, kinds.items(), strict=True):
        names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name, _ in figures[kind]]
        counts = [count for _, count in figures[kind]]
        _bars(axes, names, counts, [f"{count:,}" for count in counts], color)
        axes.set_ylim(len(names) - rows - 0.6, len(names) - 0.4)
        axes.set_title(f"most frequent {kind}" + (" tags" if kind == "general" else ""))
    return figure


def _tokens(figures: dict, max_tokens: int) -> Figure:
    counts = np.array(figures["tokens"], np.int64)
    total, too_long = int(counts.sum()), int(counts[max_tokens + 1 :].sum())
    shown = max(max_tokens + 15, int(np.searchsorted(np.cumsum(counts), 0.999 * total)) + 1)
    width = max(1, shown // 120)
    starts = np.arange((max_tokens + 1) % width - width, shown, width)  # no bar straddles the limit
    heights = np.array([counts[max(start, 0) : start + width].sum() for start in starts])
    colors = [BAD if start > max_tokens else GOOD for start in starts]
    figure, axes = pyplot.subplots(figsize=(11, 4.6), layout="constrained")
    axes.bar(starts, heights, width=width * 0.92, align="edge", color=colors)
    for chunk in range(75, max_tokens + 1, 75):
        limit = chunk == max_tokens
        axes.axvline(chunk, color=INK, linewidth=1.6 if limit else 0.8, linestyle="-" if limit else ":")
        axes.text(chunk, axes.get_ylim()[1], f" {chunk}", va="top", fontweight="bold" if limit else "normal")
    axes.set_xlabel(
        "tokens of the whole caption, before tags are dropped (dotted: what one chunk of the text encoders holds)"
    )
    axes.set_ylabel("captions")
    axes.set_xlim(0, shown)
    _count_axis(axes)
    axes.set_title(
        f"{_share(too_long, total)} of {total:,} captions are longer than {max_tokens} tokens and lose their end"
    )
    return figure
