"""The page of a build: one file that loads nothing, runs nothing and escapes every value.

The same build gives the same bytes.
"""

import base64
import hashlib
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kohaku_delta.errors import UserError
from kohaku_delta.printing import printable_page
from kohaku_delta.report import fidelity_table, images, markdown, model_card, status_badges, table_rows
from kohaku_delta.report.build_files import Comparison
from kohaku_delta.report.build_summary import Build
from kohaku_delta.units import format_duration, format_size

SECTIONS = {  # id → heading
    "result": "Result",
    "inputs": "Inputs",
    "pipeline": "Pipeline",
    "dataset": "Dataset",
    "training": "Training",
    "audit": "Audit",
    "fidelity": "Fidelity",
    "card": "Model card",
}
FOLD = 8  # a table with more rows is folded: the release has 2,001 tars and 97 buckets
AUDIT_KINDS = {"PASS": "good", "FAIL": "bad", "SKIP": "open"}


def render_page(build: Build, place: Path) -> str:
    """The page of `build`, the build of the recipe in the folder `place`."""
    style = resources.files("kohaku_delta.report").joinpath("page.css").read_text(encoding="utf-8")
    templates = Environment(
        loader=PackageLoader("kohaku_delta.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"size": format_size, "duration": format_duration, "hash": _hash}
    article, front_matter, unfinished = _card(build)
    page = templates.get_template("page.html").render(
        build=build,
        title=build.recipe.bake.title,
        sections=SECTIONS,
        fold=FOLD,
        style=Markup(style),
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        final=next((weights for weights in build.weights if weights.name == "final"), None),
        badges=status_badges.status_badges(build),
        preview=images.preview(build),
        weights=_weights(build),
        inputs=_inputs(build),
        diagram=images.pipeline(build),
        hosts=_hosts(build),
        plots=images.dataset_plots(build),
        comparison=_comparison(build),
        curves=images.curves(build),
        milestones=images.milestones(build),
        training=table_rows.training(build),
        findings=_findings(build),
        fidelity=_fidelity(build, place),
        card=article,
        front_matter=front_matter,
        unfinished=unfinished,
        license_link=model_card.license_link(build),
    )
    return printable_page(page)


def _hash(value: str) -> Markup:
    """A hash that shows its first digits; all of them when it has the focus, and when it is copied."""
    return Markup('<code class="hash" tabindex="0" title="{0}">{0}</code>').format(value)


def _weights(build: Build) -> list[tuple]:
    rows = []
    for each in build.weights:
        row: tuple = (each.file, f"{each.bytes:,}", _hash(each.sha256))
        if each.published:
            row = (*row, "the same" if each.sha256 == each.published else _hash(each.published))
        rows.append(row)
    return rows


def _inputs(build: Build) -> list[tuple[str, list[tuple]]]:
    """(caption, rows) of a table of the single files, then of one table for each input of several files."""
    rows: dict[str, list[tuple]] = {}
    for source in build.sources:
        url = Markup('<span class="url">{}</span>').format(source.url)
        rows.setdefault(source.name, []).append((url, f"{source.bytes:,}", _hash(source.sha256), source.pin))
    single = [(Markup("{}<br>{}").format(name, url), *rest) for name, [(url, *rest), *more] in rows.items() if not more]
    several = [(name, files) for name, files in rows.items() if len(files) > 1]
    return [("Single files", single), *several] if single else several


def _findings(build: Build) -> list[tuple]:
    """What the audit of this dvc.lock found."""
    status = Markup('<strong class="{}">{}</strong>')
    return [
        (f"{each.group}/{each.name}", status.format(AUDIT_KINDS[each.status], each.status), each.said)
        for each in (build.audit.findings if build.audit else [])
    ]


def _hosts(build: Build) -> list[tuple]:
    """Stages by where they ran, in the order of the pipeline."""
    hosts: dict[tuple, list[str]] = {}
    for stage in build.stages:
        if record := stage.record:
            revision = record.revision
            code = revision.commit[:12] + (", changed" if revision.dirty else "") if revision else "no repository"
            facts = (record.host.get(name, "not recorded") for name in ("processor", "python"))
            hosts.setdefault((code, record.container or "none", *facts), []).append(stage.name)
    return [(", ".join(names), *host) for host, names in hosts.items()]


def _comparison(build: Build) -> list[tuple]:
    """Figures of the dataset against the published ones."""
    found = build.dataset.published if build.dataset else None
    if not isinstance(found, Comparison):
        return []
    rows = [
        ("posts", found.posts.published, found.posts.rebuilt),
        ("steps", found.steps.published, found.steps.rebuilt),
        ("buckets of the same count", found.buckets.published, found.buckets.equal),
    ]
    return [(name, f"{published:,}", f"{here:,}", f"{here - published:+,}") for name, published, here in rows]


def _fidelity(build: Build, place: Path) -> list[tuple]:
    value = Markup("<code>{}: {}</code>")
    return [
        (Markup(row.release), Markup(row.recipe), value.format(row.key, row.value) if row.key else "–")
        for row in fidelity_table.read_fidelity_rows(place / build.recipe.root, build.recipe)
    ]


def _card(build: Build) -> tuple[Markup | None, str, str]:
    """The card as HTML, its front matter, and why there is none."""
    try:
        front_matter, body = model_card.card_parts(build)
    except UserError as refusal:
        return None, "", refusal.message
    return markdown.to_html(body, lower=2), front_matter, ""
