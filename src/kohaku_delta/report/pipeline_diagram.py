"""The pipeline as a picture: every stage of dvc.yaml, each below all that it reads.

networkx leaves out the arrows that others imply, and grandalf, which also lays out `dvc dag`, places the rest.
"""

import networkx
from grandalf.graphs import Edge, Graph, Vertex
from grandalf.layouts import SugiyamaLayout
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line

from kohaku_delta.errors import UserError
from kohaku_delta.report.plotting import GOOD, INK, QUIET, pyplot
from kohaku_delta.report.stage_status import StageStatus

WIDTH, HEIGHT, GAP = 110, 44, 36  # points: a stage's box, and the space around it


class _Box:
    """What grandalf wants of a vertex; it sets `xy`, the centre."""

    w, h = WIDTH, HEIGHT
    xy = (0.0, 0.0)


class _Route:
    """What grandalf wants of an edge; it calls `setpath` with the points to pass."""

    def setpath(self, points: list[tuple[float, float]]) -> None:
        self.points = points


def necessary_edges(stages: list[StageStatus]) -> list[tuple[str, str]]:
    """(written by, read by) of every dependency that no longer way implies."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(stage.name for stage in stages)
    graph.add_edges_from((name, stage.name) for stage in stages for name in stage.reads)
    if not networkx.is_directed_acyclic_graph(graph):
        cycle = " → ".join(name for name, _ in networkx.find_cycle(graph))
        raise UserError(f"dvc.yaml: these stages depend on each other in a circle: {cycle}. Remove a dependency.")
    return sorted(networkx.transitive_reduction(graph).edges)


def draw_pipeline(stages: list[StageStatus], notes: dict[str, str]) -> Figure:
    """notes: stage → a line below its name. The box of a stage that has not run is grey and dashed."""
    vertices = {stage.name: Vertex(stage.name) for stage in stages}
    edges = [Edge(vertices[above], vertices[below]) for above, below in necessary_edges(stages)]
    for vertex in vertices.values():
        vertex.view = _Box()
    for edge in edges:
        edge.view = _Route()
    right = 0.0
    for component in Graph(list(vertices.values()), edges).C:
        layout = SugiyamaLayout(component)
        layout.xspace = layout.yspace = GAP
        layout.init_all()
        layout.draw()
        layout.draw_edges()
        shift = right + WIDTH / 2 - min(vertex.view.xy[0] for vertex in component.sV)
        for vertex in component.sV:
            vertex.view.xy = vertex.view.xy[0] + shift, vertex.view.xy[1]
        for edge in component.sE:
            edge.view.points = [(x + shift, y) for x, y in edge.view.points]
        right = max(vertex.view.xy[0] for vertex in component.sV) + WIDTH / 2 + GAP
    bottom = max(vertex.view.xy[1] for vertex in vertices.values()) + HEIGHT / 2
    figure = pyplot.figure(figsize=((right - GAP) / 72, bottom / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, right - GAP), ylim=(bottom, 0))
    axes.axis("off")
    for edge in edges:
        (x, y), *middle, (end_x, end_y) = edge.view.points
        path = Line([(x, y + HEIGHT / 2), *middle, (end_x, end_y - HEIGHT / 2)])
        axes.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=12, color=QUIET))
    for stage in stages:
        x, y = vertices[stage.name].view.xy
        color, line = (GOOD, "-") if stage.outs else (QUIET, "--")
        corner, shape = (x - WIDTH / 2, y - HEIGHT / 2), "round,pad=0,rounding_size=8"
        axes.add_patch(
            FancyBboxPatch(
                corner, WIDTH, HEIGHT, shape, facecolor="white", edgecolor=color, linestyle=line, clip_on=False
            )
        )
        axes.text(x, y - 7, stage.name, ha="center", va="center", fontsize=12, fontweight="bold")
        axes.text(x, y + 10, notes.get(stage.name, ""), ha="center", va="center", fontsize=9, color=INK)
    return figure


def describe(stages: list[StageStatus]) -> str:
    """The picture in words, for the alternative text."""
    sentences = [
        f"{each.name} reads {', '.join(each.reads)}." if each.reads else f"{each.name} comes first." for each in stages
    ]
    return " ".join(["The pipeline.", *sentences])
