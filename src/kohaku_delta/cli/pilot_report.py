"""kohaku-delta pilot-report: computes three steps of a pilot again, and writes its report to share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click

import kohaku_delta
from kohaku_delta import atomic_files, numerics, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.errors import UserError
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import dvc_yaml

REPORT, ROW = f"{paths.BUILD}/pilot.json", f"{paths.BUILD}/pilot.md"


@click.command(cls=ComparisonCommand)
@click.argument("folder", type=FILE, default=".")
def pilot_report(folder: Path) -> None:
    """Compute the first, a middle and the last step of a finished build again; write build/pilot.json and a table row.

    FOLDER is the recipe's folder, which still has its work/. docs/hosts.md ("Pilots") says where the row belongs.

    Exit code 0: the steps are equal; 1: a step differs, and the report says so; 2: there is nothing to report.
    """
    numerics.prepare()
    # these import torch, which must find the numerics fixed
    from kohaku_delta.report import pilot_report as report
    from kohaku_delta.training import journal as journals
    from kohaku_delta.verify import replay_training

    recipe = recipes.load(folder / dvc_yaml.PARAMS)
    journal, work = journals.read_journal(folder / paths.JOURNAL), folder / recipe.execution.work
    steps = len(journal.rows)
    run, found = replay_training.nearest_state(work, journal, steps)
    if found != steps:
        raise UserError(f"{work} does not have the last state of this training, nor its log. Run `dvc repro`.")
    replayed = {step: _replay(folder, step) for step in sorted({0, steps // 2, steps - 1})}
    pilot = report.read_pilot(folder, recipe, run, replayed)
    row = report.markdown_row(pilot)
    for name, text in ((REPORT, json.dumps(pilot, indent=1, ensure_ascii=False)), (ROW, row)):
        with atomic_files.atomic_write(folder / name, "w") as file:
            file.write(f"{text}\n")
    print_line(row)
    print_line()
    print_line(f"{folder / REPORT}: the report; {folder / ROW}: its row for the table in docs/hosts.md")
    raise SystemExit(EQUAL if set(replayed.values()) == {"equal"} else DIFFERENT)


def _replay(folder: Path, step: int) -> str:
    """ "equal", or how the step differs. In a process of its own, which gives the GPU's memory back."""
    command = [sys.executable, "-P", "-m", "kohaku_delta", "replay", "--from", str(step), "--to", str(step)]
    environment = os.environ | {"PYTHONPATH": str(Path(kohaku_delta.__file__).parents[1])}
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode not in (EQUAL, DIFFERENT):
        raise UserError(f"Step {step} could not be computed again. The line above says why.")
    said = done.stdout.splitlines()[0] if done.stdout else "no output"
    print_line(f"replay: {said}")
    return "equal" if done.returncode == EQUAL else said.removeprefix("different: ")
