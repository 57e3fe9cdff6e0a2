"""kohaku-delta report: a build as one page of HTML, to be read in any browser, on any screen, without a network."""

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta.cli.stage_command import StageCommand


@click.command(cls=StageCommand)
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: build/report.html of FOLDER]")
def report(folder: Path, out: Path | None) -> None:
    """Show a build as one self-contained page. FOLDER is the recipe's, the one with params.yaml and dvc.lock."""
    from kohaku_delta.report import (
        build_summary as builds,
    )  # here, so that the other commands need not wait for what a page is made with
    from kohaku_delta.report import html_page

    build = builds.read_build(folder)
    out = out or build.folder / "report.html"
    text = html_page.render_page(build, folder)
    with atomic_files.atomic_write(out, "w") as file:
        file.write(text)
    click.echo(f"{out}: {len(text.encode()):,} bytes; open it in a browser")
