"""kohaku-delta report: a build as one HTML page, readable in any browser without a network."""

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.printing import print_line
from kohaku_delta.report import build_summary, html_page


@click.command(cls=StageCommand)
@click.argument("folder", type=FILE, default=".")
@click.option("--out", type=FILE, help="The page.  [default: build/report.html of FOLDER]")
def report(folder: Path, out: Path | None) -> None:
    """Write a build as one self-contained page. FOLDER is the recipe's folder, with params.yaml and dvc.lock."""
    build = build_summary.read_build(folder)
    out = out or build.folder / "report.html"
    text = html_page.render_page(build, folder)
    with atomic_files.atomic_write(out, "w") as file:
        file.write(text)
    print_line(f"{out}: {len(text.encode()):,} bytes; open it in a browser")
