"""Invariant: one file that loads nothing, runs nothing and escapes every value; the same build gives the same bytes."""

import base64
import hashlib
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kohaku_delta.errors import UserError
from kohaku_delta.report import (
    charts,
    fidelity_table,
    images,
    markdown,
    model_card,
    pipeline_diagram,
    status_badges,
    table_rows,
)
from kohaku_delta.report.build_summary import Build
from kohaku_delta.report.charts import Series
from kohaku_delta.report.stage_outputs import Comparison

SECTIONS = {
    "result": "Result", "inputs": "Inputs", "pipeline": "Pipeline", "dataset": "Dataset", "training": "Training", "audit": "Audit",
    "fidelity": "Fidelity", "card": "Model card",
}  # fmt: skip
FOLD = 8  # rows beyond which a table or a chart is folded: the release has 2,001 tars and 97 buckets


def render_page(build: Build, place: Path) -> str:
    """The page of `build`, the build of the recipe in the folder `place`."""
    style = resources.files("kohaku_delta.report").joinpath("page.css").read_text(encoding="utf-8")
    shapes = Environment(
        loader=PackageLoader("kohaku_delta.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shapes.filters |= {"size": table_rows.format_size, "duration": table_rows.format_duration}
    recipe = build.recipe
    article, front, unfinished = _card(build)
    return shapes.get_template("page.html").render(
        build=build, title=recipe.bake.title, sections=SECTIONS.items(), fold=FOLD, hash=_hash,
        style=Markup(style), style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        steps=table_rows.steps(build), final=next((each for each in build.weights if each.name == "final"), None), signs=status_badges.status_badges(build),
        preview=images.preview(build), weights=_weights(build), weight_heads=("file", "bytes", "sha256", *(["the release’s"] if recipe.published else [])),
        inputs=_inputs(build), diagram=_diagram(build), hosts=_hosts(build), pictures=images.dataset(build), comparison=_comparison(build),
        curves=_curves(build),
        buckets=charts.bars("Images of each bucket", [(f"{width} × {height}", count) for width, height, count in build.buckets]) if build.buckets else None,
        training=table_rows.training(build), checks=_checks(build),
        fidelity=_fidelity(build, place), card=article, front_matter=front, unfinished=unfinished, link=model_card.LICENSES.get(recipe.bake.license, (None, None))[1],
        lock=hashlib.sha256((place / "dvc.lock").read_bytes()).hexdigest(),
    )  # fmt: skip


def _hash(value: str) -> Markup:
    """A hash that shows its first digits, and all of them when it is touched or copied."""
    return Markup('<code class="hash" tabindex="0" title="{0}">{0}</code>').format(value)


def _weights(build: Build) -> list[tuple]:
    rows = []
    for each in build.weights:
        row = (each.file, f"{each.bytes:,}", _hash(each.sha256))
        rows.append(
            row
            if each.published is None
            else (*row, "the same" if each.published == each.sha256 else _hash(each.published))
        )
    return rows


def _inputs(build: Build) -> list[tuple[str, list[tuple], bool]]:
    """(name, rows, folded) of a table of the single files, then of one for each input of several files."""
    rows: dict[str, list[tuple]] = {}
    for source in build.sources:
        url = Markup('<span class="url">{}</span>').format(source.url)
        rows.setdefault(source.name, []).append((url, f"{source.bytes:,}", _hash(source.sha256), source.pin))
    single = [
        (Markup("{}<br>{}").format(name, files[0][0]), *files[0][1:]) for name, files in rows.items() if len(files) == 1
    ]
    several = [(name, files, len(files) > FOLD) for name, files in rows.items() if len(files) > 1]
    return [("Single files", single, False), *several] if single else several


def _diagram(build: Build) -> Markup:
    notes = {}
    for stage in build.stages:
        notes[stage.name] = (
            [max(stage.outs.values(), key=lambda out: out.size).md5[:10]] if stage.outs else ["has not run"]
        )
        if record := build.told.records.get(stage.name):
            notes[stage.name].append(table_rows.format_duration(record.times.seconds))
    return pipeline_diagram.draw(build.stages, notes)


def _checks(build: Build) -> list[tuple]:
    """What the audit said, where it was of this lock."""
    audit = None if build.told.foreign else build.told.audit
    status = {
        word: Markup(f'<strong class="{kind}">{word}</strong>')
        for word, kind in (("PASS", "good"), ("FAIL", "bad"), ("SKIP", "open"))
    }
    return [(f"{each.group}/{each.name}", status[each.status], each.said) for each in audit.findings] if audit else []


def _hosts(build: Build) -> list[tuple]:
    """Stages by where they ran, in the order of the pipeline."""
    found: dict[tuple, list[str]] = {}
    for stage in build.stages:
        if record := build.told.records.get(stage.name):
            code = (
                f"{record.revision.commit[:12]}{', changed' if record.revision.dirty else ''}"
                if record.revision
                else "no repository"
            )
            host = (
                code,
                record.container or "none",
                record.host.get("processor", "not told"),
                record.host.get("python", "not told"),
            )
            found.setdefault(host, []).append(stage.name)
    return [(", ".join(names), *host) for host, names in found.items()]


def _comparison(build: Build) -> list[tuple]:
    told = build.dataset.published if build.dataset else None
    if not isinstance(told, Comparison):
        return []
    rows = [
        (name, f"{each.published:,}", f"{each.rebuilt:,}", f"{each.difference:+,}")
        for name, each in (("posts", told.posts), ("steps", told.steps))
    ]
    return [
        *rows,
        (
            "buckets of the same count",
            f"{told.buckets.published:,}",
            f"{told.buckets.equal:,}",
            f"{told.buckets.equal - told.buckets.published:+,}",
        ),
    ]


def _curves(build: Build) -> list[tuple[str, str, Markup]]:
    """(name, what is seen, picture)."""
    if not build.curves:
        return []
    values = build.curves
    told = (
        "each step, and the moving mean"
        if table_rows.steps(build) <= charts.COLUMNS
        else "range, mean and moving mean of neighbouring steps"
    )
    return [
        ("Loss", told, charts.line("Loss", [Series("loss", values["loss"])], smooth=True)),
        (
            "Gradient norm",
            f"before clipping: {told}",
            charts.line("Gradient norm", [Series("norm", values["gradient_norm"])], smooth=True),
        ),
        (
            "Learning rate",
            Markup('<span class="key s0">U-Net</span> <span class="key s1">both text encoders</span>'),
            charts.line(
                "Learning rate",
                [Series("U-Net", values["learning_rate_unet"]), Series("text encoders", values["learning_rate_text"])],
            ),
        ),
    ]


def _fidelity(build: Build, place: Path) -> list[tuple]:
    value, rows = (
        Markup("<code>{}: {}</code>"),
        fidelity_table.read_fidelity_rows(place / build.recipe.root, build.recipe),
    )
    return [
        (Markup(row.release), Markup(row.here), value.format(row.key, row.value) if row.key else "–") for row in rows
    ]


def _card(build: Build) -> tuple[Markup | None, str, str]:
    """The card as HTML, its front matter, and why there is none."""
    try:
        front, body = model_card.parts(build)
    except UserError as refusal:
        return None, "", refusal.message
    return markdown.to_html(body, lower=2), front, ""
