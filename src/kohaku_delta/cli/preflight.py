"""kohaku-delta preflight: can this host make the recipe? A table, green and red, before anything is spent; or the plan
for a host that is elsewhere.
"""

from pathlib import Path

import click

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.preflight import build_plan, host_checks, host_facts, parameter_counts
from kohaku_delta.provenance import import_closure

FILE = click.Path(path_type=Path)


@click.command(cls=ComparisonCommand)
@click.option("--params", type=FILE, default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--simulate",
    metavar="HOST",
    help='Print the plan for a host that is elsewhere: "2x RTX 3090, memory 64 GB, disk 2 TB".',
)
@click.option(
    "--seconds-per-step",
    type=click.FloatRange(min=0, min_open=True),
    help="A step's time, measured on such a host.  [default: the release's, on its host]",
)
def preflight(params: Path, simulate: str | None, seconds_per_step: float | None) -> None:
    """Check that this host can make the recipe: libraries, numerics, GPUs, memory, disk.

    Exit code 0: all is green; 1: a line is red, and says what to do; 2: it cannot be judged."""
    if seconds_per_step and not simulate:
        raise click.UsageError("--seconds-per-step needs --simulate.")
    recipe = recipes.load(params)
    lock = params.parent / recipe.root / "requirements" / f"{recipe.requirements}.txt"
    locked = {name: each.version for name, each in import_closure.locked_libraries(lock).items()}
    if simulate:
        there = build_plan.parse_host(simulate)
        numerics.prepare()
        numbers = parameter_counts.count_parameters(recipe, params.parent)
        _print_plan(
            [
                (row.what, row.figure, row.source)
                for row in build_plan.plan_rows(recipe, numbers, there, seconds_per_step)
            ]
        )
        click.echo()
    else:
        there, numbers = host_facts.inspect_host(recipe, params)
    lines = host_checks.all_checks(recipe, there, numbers, locked)
    _print_checks(lines)
    if numbers is None and not simulate:
        click.echo(f"memory and disk are not judged: {build_plan.unknown_sizes(recipe)}")
    red = [line for line in lines if not line.good]
    click.echo(
        f"preflight: {len(lines) - len(red)} of {len(lines)} are green"
        + (f"; red: {', '.join(line.name for line in red)}" if red else "")
    )
    raise SystemExit(1 if red else 0)


def _print_checks(lines: list[host_checks.CheckResult]) -> None:
    """The table: a word and a colour a line (colour only on a terminal), and under a red one its remedy."""
    width = max(len(line.name) for line in lines)
    for line in lines:
        click.echo(
            f"{click.style('green' if line.good else 'red  ', fg='green' if line.good else 'red')}  {line.name:<{width}}  {line.says}"
        )
        if not line.good:
            click.echo(f"       {'':<{width}}  → {line.remedy}")


def _print_plan(rows: list[tuple[str, str, str]]) -> None:
    first, second = (max(len(row[place]) for row in rows) for place in (0, 1))
    for what, figure, source in rows:
        click.echo(f"{what:<{first}}  {figure:>{second}}  {source}".rstrip())
