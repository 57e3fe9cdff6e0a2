"""Curves are drawn to scale from every value; the picture of the pipeline shows exactly what must wait for what."""

import itertools
import math
import re

import pytest

import build_factory
from kohaku_delta.report import charts, pipeline_diagram, stage_status
from kohaku_delta.report.charts import Series


def points(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in found.split()]
        for found in re.findall(rf'<polyline class="{kind} s\d" points="([^"]*)"', svg)
    ]


def axis(svg: str) -> tuple[float, float]:
    """Pixels of one unit, and of zero, as the ticks beside the rules say."""
    ticks = [
        (float(y), float(text))
        for y, text in re.findall(r'y="([\d.]+)" dy="0.33em" text-anchor="end">([-\d.e+]+)<', svg)
    ]
    (low, a), (high, b) = ticks[0], ticks[-1]
    return (high - low) / (b - a), low - a * (high - low) / (b - a)


@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 2.0], [0.17, 0.02, 0.4, 0.31], [3e-5, 1e-5], [-1.0, 4.0], [5.0], [1000.0, 20000.0, 7.0]]
)
def test_a_curve_is_to_scale(values):
    svg = charts.line("Loss", [Series("loss", values)])
    [drawn] = points(svg, "mean")
    unit, zero = axis(svg)
    assert len(drawn) == len(values)
    assert all(y == pytest.approx(zero + unit * value, abs=0.6) for (_, y), value in zip(drawn, values, strict=True))
    steps = [x for x, _ in drawn]
    assert all(b - a == pytest.approx(steps[1] - steps[0], abs=0.11) for a, b in itertools.pairwise(steps))


def test_a_peak_of_one_step_among_many_is_seen():
    values = [0.1] * 28_638
    values[12_345], values[20_000] = 0.9, 0.01
    svg = charts.line("Loss", [Series("loss", values)], smooth=True)
    unit, zero = axis(svg)
    [shape] = re.findall(r'<path class="range s0" d="M([^"]*)Z"', svg)
    heights = [float(pair.split(",")[1]) for pair in shape.split()]
    assert min(heights) == pytest.approx(zero + unit * 0.9, abs=0.6) and max(heights) == pytest.approx(
        zero + unit * 0.01, abs=0.6
    )
    assert len(svg) < 40_000 and "between 0.01 and 0.9" in svg and "28,638 steps" in svg


def test_a_value_that_is_no_number_is_a_gap_and_is_told():
    svg = charts.line("Loss", [Series("loss", [0.5, math.nan, math.inf, 0.25])])
    assert (
        [len(each) for each in points(svg, "mean")] == [2]
        and "2 values are not finite" in svg
        and "nan" not in svg.lower()
    )
    assert "no finite value" in charts.line("Loss", [Series("loss", [math.nan])])


def test_the_moving_mean_of_a_straight_line_is_the_line():
    svg = charts.line("Loss", [Series("loss", [0.1 * step for step in range(200)])], smooth=True)
    assert points(svg, "mean") == points(svg, "raw")


def stage(name: str, reads: list[str]) -> stage_status.StageStatus:
    return stage_status.StageStatus(name, reads, [], {}, {})


def followers(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Who comes after whom, over any number of arrows."""
    found = set(arrows)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


PIPELINES = {
    "of dvc.yaml": lambda: stage_status.read_stages(build_factory.ROOT / "miniature"),
    "wide": lambda: [
        stage("a", []),
        *(stage(f"b{number}", ["a"]) for number in range(5)),
        stage("c", ["b0", "b4"]),
        stage("d", ["a", "c"]),
    ],
    "two apart": lambda: [stage("a", []), stage("b", []), stage("c", ["a"])],
    "one": lambda: [stage("a", [])],
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_picture_shows_what_waits_for_what(pipeline):
    stages = PIPELINES[pipeline]()
    svg = pipeline_diagram.draw(stages, {})
    boxes = {
        name: tuple(map(float, box)) for *box, name in re.findall(r'<rect class="node[^"]*" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)".*?class="name">([^<]+)<', svg)
    }  # fmt: skip
    assert list(boxes) == [each.name for each in stages]
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes.values())
    for (x, y, w, _), (other, below, _, _) in itertools.combinations(boxes.values(), 2):
        assert y != below or abs(x - other) >= w

    def box(x: float, y: float) -> str:
        return next(
            name for name, (left, top, w, h) in boxes.items() if left <= x <= left + w and top - 3 <= y <= top + h + 3
        )

    arrows = set()
    for path in re.findall(r'<path class="arrow" d="([^"]*)"', svg):
        ends = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", path)]
        assert ends[0][1] < ends[-1][1] and all(a[1] <= b[1] for a, b in itertools.pairwise(ends))
        arrows.add((box(*ends[0]), box(*ends[-1])))
    assert followers(arrows) == followers({(above, each.name) for each in stages for above in each.reads})
    assert not [arrow for arrow in arrows if arrow in followers(arrows - {arrow})], "no arrow says what others say"


def test_stages_that_wait_for_each_other_do_not_hang_the_page():
    assert "<svg" in pipeline_diagram.draw([stage("a", ["b"]), stage("b", ["a"]), stage("c", ["c"])], {})
