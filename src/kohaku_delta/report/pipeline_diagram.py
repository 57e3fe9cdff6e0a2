"""Invariant: the picture has every stage of dvc.yaml, and an arrow's head never stands above its tail.

Stages lie in layers, each below all that it reads; an arrow is drawn where no longer way shows the same. Arrows across
layers keep a place of their own in each, so that none runs through a stage.
"""

from markupsafe import Markup, escape

from kohaku_delta.report.stage_status import StageStatus

PITCH, TALL = 84, 46
WIDE, NARROW, GAP = 112, 12, 28


def draw(stages: list[StageStatus], notes: dict[str, list[str]]) -> Markup:
    """An SVG of the pipeline. `notes`: up to two short lines under each stage's name."""
    reads = {stage.name: stage.reads for stage in stages}
    layer = _layers(reads)
    arrows = [
        (above, below)
        for below, names in reads.items()
        for above in names
        if not _is_redundant(reads, layer, above, below)
    ]
    rows, ways = _layout_rows(layer, arrows)
    width = max([_width(row) for row in rows] + [3 * WIDE]) + 4
    places = {node: (x, number) for number, row in enumerate(rows) for node, x in _spread(row, width)}
    parts = [f'<path class="arrow" d="{_curve([places[node] for node in way])}"/>' for way in ways]
    run = {stage.name for stage in stages if stage.outs}
    for name in reads:
        x, number = places[name]
        kind, top = "node" if name in run else "node missing", number * PITCH + 2
        lines = [f'<tspan class="note" x="{x:.1f}" dy="13">{escape(note)}</tspan>' for note in notes.get(name, [])]
        parts.append(
            f'<a href="#stage-{escape(name)}"><rect class="{kind}" x="{x - WIDE / 2:.1f}" y="{top}" width="{WIDE}" height="{TALL}" rx="8"/>'
            f'<text x="{x:.1f}" y="{top + (28, 20, 15)[len(lines)]}" text-anchor="middle"><tspan class="name">{escape(name)}</tspan>{"".join(lines)}</text></a>'
        )
    label = "The pipeline. " + " ".join(
        f"{name} reads {', '.join(names)}." if names else f"{name} comes first." for name, names in reads.items()
    )
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0.5L7.5,4L0,7.5Z"/></marker>'
    svg = '<svg class="pipeline" viewBox="0 0 {} {}" role="group" aria-label="{}"><defs>{}</defs>{}</svg>'
    return Markup(svg).format(width, (len(rows) - 1) * PITCH + TALL + 4, label, Markup(head), Markup("".join(parts)))


def _layers(reads: dict[str, list[str]]) -> dict[str, int]:
    """How many stages stand above each on the longest way. Stages that wait for each other, which DVC refuses, keep the
    last layer found.
    """
    layer = dict.fromkeys(reads, 0)
    for _ in reads:
        for name, above in reads.items():
            layer[name] = max([layer[name], *(min(layer[each] + 1, len(reads)) for each in above)])
    return layer


def _is_redundant(reads: dict, layer: dict, above: str, below: str) -> bool:
    """Whether another way than the arrow itself leads from `above` to `below`."""
    waiting, seen = [each for each in reads[below] if each != above and layer[each] > layer[above]], set()
    while waiting:
        name = waiting.pop()
        if name == above:
            return True
        if name not in seen:
            seen.add(name)
            waiting += [each for each in reads[name] if layer[each] >= layer[above]]
    return False


def _layout_rows(layer: dict[str, int], arrows: list[tuple[str, str]]) -> tuple[list[list], list[list]]:
    """The nodes of each layer from left to right, and the nodes that each arrow visits. A node is a stage's name, or
    (arrow, layer) on an arrow's way.
    """
    rows = [[name for name in layer if layer[name] == number] for number in range(max(layer.values(), default=-1) + 1)]
    ways = []
    for above, below in arrows:
        between = [((above, below), number) for number in range(layer[above] + 1, layer[below])]
        for node in between:
            rows[node[1]].append(node)
        ways.append([above, *between, below])
    before: dict = {}
    for way in ways:
        for upper, lower in zip(way, way[1:]):
            before.setdefault(lower, []).append(upper)
    for upper, lower in zip(rows, rows[1:]):
        place = {node: (number + 0.5) / len(upper) for number, node in enumerate(upper)}
        weight = {
            node: sum(near) / len(near)
            if (near := [place[each] for each in before.get(node, []) if each in place])
            else 0.5
            for node in lower
        }
        lower.sort(key=weight.__getitem__)  # stable: equals stay in the order of dvc.yaml
    return rows, ways


def _width(row: list) -> int:
    """A stage is wide, an arrow's place narrow."""
    return sum(WIDE if isinstance(node, str) else NARROW for node in row) + GAP * (len(row) - 1)


def _spread(row: list, width: int) -> list[tuple[object, float]]:
    """The middle of each node of a layer, centred in `width`."""
    x, found = (width - _width(row)) / 2, []
    for node in row:
        size = WIDE if isinstance(node, str) else NARROW
        found.append((node, x + size / 2))
        x += size + GAP
    return found


def _curve(points: list[tuple[float, int]]) -> str:
    x, number = points[0]
    y, path = number * PITCH + TALL + 2, f"M{x:.1f},{number * PITCH + TALL + 2}"
    for place, (to, number) in enumerate(points[1:], 2):
        last = place == len(points)
        top = number * PITCH + (0 if last else 2)
        bend = (top - y) / 2
        path += f"C{x:.1f},{y + bend:.1f} {to:.1f},{top - bend:.1f} {to:.1f},{top}"
        x, y = to, top
        if not last:
            y = top + TALL
            path += f"L{x:.1f},{y}"
    return path
