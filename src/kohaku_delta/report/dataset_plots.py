"""Invariant: the same figures give the same bytes, and each picture says one thing, in its title, at a glance."""

import io
import warnings
from pathlib import Path

import matplotlib
import numpy as np

from kohaku_delta import atomic_files
from kohaku_delta.params import Caption, PublishedDataset

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot

# what it found on this host, or in a list that it keeps in the home directory, must not decide
font_manager.fontManager.ttflist = []
for font in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf")):
    font_manager.fontManager.addfont(font)

INK, QUIET, GOOD, BAD, LINE = "#1f2933", "#9aa5b1", "#2f7ed8", "#d9534f", "#e4e7eb"
PERIODS = ("#c3cfe2", "#9fb8dd", "#7ba0d8", "#5789d3", "#3372ce", "#1c5bb0")
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 14, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 14,
    "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "text.parse_math": False, "axes.unicode_minus": False, "figure.dpi": 100, "savefig.dpi": 100,
}  # fmt: skip


def draw_plots(
    figures: dict, caption: Caption, length: int, published: PublishedDataset | None, folder: Path
) -> list[str]:
    """Writes every picture of the report into `folder` and returns their names. `length` is the trainer's longest
    caption in tokens.
    """
    pictures = {
        "posts.png": lambda: _posts(figures), "ratings.png": lambda: _ratings(figures, caption), "years.png": lambda: _years(figures, caption),
        "buckets.png": lambda: _buckets(figures, published), "names.png": lambda: _names(figures), "tokens.png": lambda: _tokens(figures, length),
    }  # fmt: skip
    for name, picture in pictures.items():
        with (
            matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
            figure = picture()
            file = io.BytesIO()
            figure.savefig(
                file, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.3, facecolor="white"
            )
            pyplot.close(figure)
        with atomic_files.atomic_write(folder / name) as out:
            out.write(file.getvalue())
    return list(pictures)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / max(whole, 1):.{1 if 1000 * part >= whole else 2}f} %)" if part else "0"


def _bars(axes, names: list[str], values: list[int], labels: list[str], colour) -> None:
    """Horizontal bars, the first one at the top, each with its label behind it."""
    places = np.arange(len(names))[::-1]
    axes.barh(places, values, color=colour, height=0.72)
    for place, value, label in zip(places, values, labels, strict=True):
        axes.text(value + max([*values, 1]) * 0.012, place, label, va="center", fontsize=10)
    axes.set_yticks(places, names)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(0, max([*values, 1]) * 1.25)
    axes.set_ylim(-0.6, max(len(names), 1) - 0.4)


def _posts(figures: dict):
    selected, trained, dropped, despite = (figures[name] for name in ("selected", "trained", "dropped", "despite"))
    rows = [max(1, len(dropped)), max(1, len(despite))]
    figure, (first, second, third) = pyplot.subplots(
        3, 1, figsize=(10, 3.2 + 0.42 * sum(rows)), height_ratios=[1.6, rows[0], rows[1]], layout="constrained"
    )
    figure.get_layout_engine().set(hspace=0.08)
    first.barh([0], [trained], color=GOOD)
    first.barh([0], [selected - trained], left=[trained], color=BAD)
    first.set_xlim(0, max(selected, 1))
    first.axis("off")
    first.set_title(f"{_share(trained, selected)} of {selected:,} selected posts are trained on")
    first.text(trained / 2, 0, f"trained {trained:,}", ha="center", va="center", color="white", fontweight="bold")
    first.text(selected, -0.62, f"dropped {selected - trained:,}", ha="right", color=BAD, fontweight="bold")
    for axes, counts, title, colour in (
        (second, dropped, "why the others are dropped", BAD),
        (third, despite, "trained on although the metadata speaks against them: their file is in a tar", QUIET),
    ):
        axes.set_title(title, fontsize=12)
        whole = sum(counts.values())
        _bars(
            axes,
            list(counts) or ["none"],
            list(counts.values()) or [0],
            [_share(each, whole) for each in counts.values()] or [""],
            colour,
        )
    return figure


def _ratings(figures: dict, caption: Caption):
    matrix = np.array(figures["ratings"])
    rows, columns = (
        [", ".join(words) for words in caption.ratings.values()] + ["no rating"],
        [*caption.quality, "no quality tag"],
    )
    present = [place for place in range(len(rows)) if place < len(rows) - 1 or matrix[place].any()]
    matrix, rows = matrix[present], [rows[place] for place in present]
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.75 * len(rows)), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
    for (row, column), count in np.ndenumerate(matrix):
        colour = "white" if shares[row, column] > 0.3 else INK
        axes.text(
            column,
            row,
            f"{count:,}\n{100 * shares[row, column]:.0f} %" if count else "·",
            ha="center",
            va="center",
            color=colour,
            fontsize=10,
        )
    axes.set_xticks(range(len(columns)), [name.replace(" ", "\n") for name in columns])
    axes.set_yticks(
        range(len(rows)),
        [
            f"{name}\n{_share(int(count), int(matrix.sum()))}"
            for name, count in zip(rows, matrix.sum(axis=1), strict=True)
        ],
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("quality of each rating's posts")
    return figure


def _years(figures: dict, caption: Caption):
    years = {year: count for year, count in figures["years"].items() if year}
    unreadable = figures["years"].get(0, 0)
    low, high = min([*years, caption.first_year]), max([*years, *caption.years])
    low, high = (
        max(low, caption.first_year - 5),
        min(high, max(caption.years) + 5),
    )  # one odd date does not stretch the axis
    outside = sum(count for year, count in years.items() if not low <= year <= high)
    figure, axes = pyplot.subplots(figsize=(11, 4.6), layout="constrained")
    ends = [caption.first_year - 1, *caption.years]
    names = [f"before {caption.first_year}: {caption.before_first_year or 'no tag'}", *caption.years.values(), "no tag"]
    seen = set()
    for year in range(low, high + 1):
        period = int(np.searchsorted(ends, year))
        count = years.get(year, 0)
        label = names[period] if period not in seen and count else None
        seen |= {period} if count else set()
        axes.bar(
            year,
            count,
            color=PERIODS[min(period, len(PERIODS) - 1)] if period < len(ends) else QUIET,
            width=0.82,
            label=label,
        )
    axes.set_xticks(range(low, high + 1), range(low, high + 1), rotation=60)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.grid(color=LINE)
    axes.set_axisbelow(True)
    if seen:
        axes.legend(title="date tag", frameon=False, loc="upper left")
    notes = [
        f"{unreadable:,} unreadable dates" if unreadable else "",
        f"{outside:,} posts of other years are not shown" if outside else "",
    ]
    axes.set_title("posts of each year" + "".join(f"; {note}" for note in notes if note))
    return figure


def _buckets(figures: dict, published: PublishedDataset | None):
    sizes = figures["buckets"]
    figure, axes = pyplot.subplots(figsize=(max(8, 0.17 * len(sizes) + 2), 5.4), layout="constrained")
    counts = [count for _, _, count in sizes]
    colours = [GOOD if width < height else INK if width == height else "#7ba0d8" for width, height, _ in sizes]
    axes.bar(range(len(sizes)), counts, color=colours, width=0.82)
    axes.set_yscale("log")
    axes.set_ylim(0.7, max([*counts, 1]) * 6)  # room for the legend
    axes.set_xticks(
        range(len(sizes)),
        [f"{width} × {height}" for width, height, _ in sizes],
        rotation=90,
        fontsize=7 if len(sizes) > 50 else 10,
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.grid(color=LINE)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.8, len(sizes) - 0.2)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (GOOD, INK, "#7ba0d8")]
    labels = ["portrait", "square", "landscape"]
    if published is not None:
        place = {(width, height): number for number, (width, height, _) in enumerate(sizes)}
        known = [
            (place[width, height], count) for width, height, count in published.buckets if (width, height) in place
        ]
        handles.append(
            axes.scatter([number for number, _ in known], [count for _, count in known], color=BAD, s=26, zorder=3)
        )
        labels.append(f"published ({len(published.buckets)} buckets are known)")
    axes.legend(handles, labels, frameon=False, loc="upper left", ncols=4)
    axes.set_title(
        f"images of each of {len(sizes)} buckets: {figures['micro_batches']:,} micro-batches, {figures['steps']:,} steps"
    )
    return figure


def _names(figures: dict):
    kinds = {"artists": GOOD, "characters": "#7ba0d8", "general": QUIET}
    most = max([len(figures[kind]) for kind in kinds] + [1])
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 1.2 + 0.32 * most), layout="constrained")
    for axes, (kind, colour) in zip(panels, kinds.items(), strict=True):
        names = [name if len(name) <= 30 else name[:29] + "…" for name, _ in figures[kind]]
        values = [count for _, count in figures[kind]]
        _bars(axes, names, values, [f"{count:,}" for count in values], colour)
        axes.set_ylim(len(names) - most - 0.6, len(names) - 0.4)
        axes.set_title(f"most frequent {kind}" + (" tags" if kind == "general" else ""))
    return figure


def _tokens(figures: dict, length: int):
    counts = np.array(figures["tokens"], np.int64)
    whole, over = int(counts.sum()), int(counts[length + 1 :].sum())
    shown = max(length + 15, int(np.searchsorted(np.cumsum(counts), 0.999 * whole)) + 1)
    step = max(1, shown // 120)
    figure, axes = pyplot.subplots(figsize=(11, 4.6), layout="constrained")
    starts = np.arange((length + 1) % step - step, shown, step)  # no bar lies on both sides of the limit
    heights = np.array([counts[max(start, 0) : start + step].sum() for start in starts])
    axes.bar(
        starts, heights, width=step * 0.92, align="edge", color=[BAD if start > length else GOOD for start in starts]
    )
    for line in range(75, length + 1, 75):
        axes.axvline(
            line, color=INK, linewidth=1.6 if line == length else 0.8, linestyle="-" if line == length else ":"
        )
        axes.text(line, axes.get_ylim()[1], f" {line}", va="top", fontweight="bold" if line == length else "normal")
    axes.set_xlabel(
        "tokens of the whole caption, before tags are dropped (dotted: what one chunk of the text encoders holds)"
    )
    axes.set_ylabel("captions")
    axes.set_xlim(0, shown)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.grid(color=LINE)
    axes.set_axisbelow(True)
    axes.set_title(f"{_share(over, whole)} of {whole:,} captions are longer than {length} tokens and lose their end")
    return figure
