"""Every value of a curve is drawn; the pipeline's picture shows exactly which stage waits for which."""

import io
import itertools
import math

import networkx
import numpy as np
import pytest
from PIL import Image

import build_factory
from kohaku_delta.errors import UserError
from kohaku_delta.report import charts, pipeline_diagram, plotting, stage_status
from kohaku_delta.report.charts import Series


def lines(*values: list[float], smooth: bool = False) -> list[np.ndarray]:
    """The y values of each line of the chart; each lies within the y axis."""
    [axes] = charts.draw_curves([Series(f"series {number}", each) for number, each in enumerate(values)], smooth).axes
    low, high = axes.get_ylim()
    drawn = [line.get_ydata() for line in axes.get_lines()]
    assert all(low <= value <= high for line in drawn for value in line if np.isfinite(value)) and low <= 0
    return drawn


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [3e-5, 1e-5], [-1.0, 4.0], [5.0], [1000.0, 20000.0, 7.0]])
def test_every_value_of_a_curve_is_drawn(values):
    [drawn] = lines(values)
    assert drawn.tolist() == values


def test_a_peak_of_one_step_among_many_is_seen():
    """In the pixels: among the columns of 28,638 steps, only the peak's reaches the upper half of the chart."""
    values = [0.1] * 28_638
    values[12_345] = 0.9
    series = [Series("loss", values)]
    png = plotting.to_png(lambda: charts.draw_curves(series, smooth=True))
    assert png == plotting.to_png(lambda: charts.draw_curves(series, smooth=True))
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    blue = (picture[:, :, 2] - picture[:, :, 0]) > 20
    assert 0 < blue[: len(blue) // 2].any(axis=0).sum() <= 6
    assert (
        charts.describe("Loss", series)
        == "Loss over 28,638 steps: loss starts at 0.1 and ends at 0.1, between 0.1 and 0.9"
    )


def test_a_value_that_is_not_finite_is_a_gap_and_is_counted():
    [drawn] = lines([0.5, math.nan, math.inf, 0.25])
    assert np.isfinite(drawn).tolist() == [True, False, False, True]
    text = charts.describe("Loss", [Series("loss", [0.5, math.nan, math.inf, 0.25])])
    assert "2 values are not finite" in text and "nan" not in text.lower()
    assert "no finite value" in charts.describe("Loss", [Series("loss", [math.nan])])
    lines([math.nan])


def test_the_moving_mean_of_a_straight_line_is_the_line():
    straight, mean = lines([0.1 * step for step in range(200)], smooth=True)
    assert np.allclose(straight, mean, atol=1e-12)


def stage(name: str, reads: list[str]) -> stage_status.StageStatus:
    return stage_status.StageStatus(name, reads, {}, {})


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
def test_the_picture_shows_which_stage_waits_for_which(pipeline):
    stages = PIPELINES[pipeline]()
    edges = pipeline_diagram.necessary_edges(stages)
    declared = networkx.DiGraph([(above, each.name) for each in stages for above in each.reads])
    assert set(networkx.transitive_closure(networkx.DiGraph(edges)).edges) == set(
        networkx.transitive_closure(declared).edges
    )
    for edge in edges:
        others = networkx.DiGraph([other for other in edges if other != edge])
        assert not (set(edge) <= set(others) and networkx.has_path(others, *edge)), f"{edge} is implied by others"

    [axes] = pipeline_diagram.draw_pipeline(stages, {}).axes
    boxes = {
        text.get_text(): patch
        for text, patch in zip(
            [text for text in axes.texts if text.get_text()],
            [patch for patch in axes.patches if hasattr(patch, "get_boxstyle")],
            strict=True,
        )
    }
    assert list(boxes) == [each.name for each in stages]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for box in boxes.values():
        assert left <= box.get_x() and box.get_x() + box.get_width() <= right
        assert top <= box.get_y() and box.get_y() + box.get_height() <= bottom
    for one, other in itertools.combinations(boxes.values(), 2):
        assert one.get_y() != other.get_y() or abs(one.get_x() - other.get_x()) >= one.get_width()
    for above, below in edges:
        assert boxes[above].get_y() < boxes[below].get_y()


def test_stages_that_depend_on_each_other_are_refused():
    with pytest.raises(UserError, match="depend on each other in a circle"):
        pipeline_diagram.necessary_edges([stage("a", ["b"]), stage("b", ["a"])])
