"""kohaku-delta pin: fills in missing revisions, sizes and hashes from the Hub, and shows a diff before writing."""

from pathlib import Path

import click

from kohaku_delta import atomic_files
from kohaku_delta import params as recipes
from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.hub import fill_pins
from kohaku_delta.printing import print_line

MAX_LINES = 30  # of a diff


@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe whose pins are filled in.")
@click.option("--yes", is_flag=True, help="Write without asking.")
def pin(params: Path, yes: bool) -> None:
    """Fill in what the pins of params.yaml leave open: revision, bytes, sha256.

    Reads the Hub's list of files at the pinned revision; downloads nothing. Shows the change before writing it.
    """
    edit = fill_pins.fill_pins(params, recipes.load(params))
    for path, content in reversed(edit.files.items()):
        lines = fill_pins.unified_diff(path, content)
        more = [f"… and {len(lines) - MAX_LINES:,} more lines"] if len(lines) > MAX_LINES else []
        for line in lines[:MAX_LINES] + more:
            print_line(line)
    for sentence in edit.remarks:
        print_line(sentence)
    if not edit.files:
        print_line(f"{params}: no pin of a file on the Hub leaves anything open")
    elif yes or click.confirm("Write this?"):
        for path, content in edit.files.items():  # the lists first: params.yaml holds their digests
            with atomic_files.atomic_write(path) as file:
                file.write(content)
            print_line(f"written: {path}")
    else:
        print_line("nothing was written")
        raise SystemExit(1)
