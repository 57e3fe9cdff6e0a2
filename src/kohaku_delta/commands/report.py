"""kohaku-delta report: a build as one page of HTML, to be read in any browser, on any screen, without a network."""

from pathlib import Path

import click

from kohaku_delta import atomic
from kohaku_delta.stage import Stage


@click.command(cls=Stage)
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: build/report.html of FOLDER]")
def report(folder: Path, out: Path | None) -> None:
    """Show a build as one self-contained page. FOLDER is the recipe's, the one with params.yaml and dvc.lock."""
    from kohaku_delta.report import build as builds  # here, so that the other commands need not wait for what a page is made with
    from kohaku_delta.report import page

    build = builds.read(folder)
    out = out or build.folder / "report.html"
    text = page.html(build, folder)
    with atomic.writing(out, "w") as file:
        file.write(text)
    click.echo(f"{out}: {len(text.encode()):,} bytes; open it in a browser")
