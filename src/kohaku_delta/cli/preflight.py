"""kohaku-delta preflight: can this host build the recipe? Or the plan for a host that is only described."""

from pathlib import Path

import click

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.preflight import build_plan, host_checks, host_facts, parameter_counts
from kohaku_delta.preflight.build_plan import PlanRow
from kohaku_delta.preflight.host_checks import CheckResult
from kohaku_delta.printing import print_line


@click.command(cls=ComparisonCommand)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option(
    "--simulate", metavar="HOST", help='Print the plan for another host: "2x RTX 3090, memory 64 GB, disk 2 TB".'
)
@click.option(
    "--seconds-per-step",
    type=click.FloatRange(min=0, min_open=True),
    help="Time per step, measured on such a host.  [default: the release's, on its own GPUs]",
)
def preflight(params: Path, simulate: str | None, seconds_per_step: float | None) -> None:
    """Check that this host can build the recipe: libraries, numerics, GPUs, memory, disk.

    Exit code 0: all checks passed; 1: some failed, and say what to do; 2: the host cannot be checked."""
    if seconds_per_step is not None and simulate is None:
        raise click.UsageError("--seconds-per-step needs --simulate.")
    if seconds_per_step is not None and not seconds_per_step < 1e6:  # NaN too
        raise click.UsageError(
            f"--seconds-per-step {seconds_per_step:g}: a number of seconds below a million is needed."
        )
    recipe = recipes.load(params)
    if simulate is not None:
        numerics.prepare()
        model = parameter_counts.count_parameters(recipe, params.parent)
        host = build_plan.parse_host(simulate, host_facts.locked_versions(recipe, params.parent), model)
        _print_plan(build_plan.plan_rows(recipe, host, seconds_per_step))
    else:
        host = host_facts.inspect_host(recipe, params)
    results = host_checks.run_checks(host, recipe)
    _print_results(results)
    if host.model is None and not simulate:
        print_line(f"memory and disk are not checked: {build_plan.unknown_size(recipe)}")
    if simulate is not None and (left_out := build_plan.not_described(host)):
        print_line(f"not checked, because --simulate does not name it: {', '.join(left_out)}")
    failed = [result.name for result in results if not result.ok]
    note = f"; red: {', '.join(failed)}" if failed else ""
    print_line(f"preflight: {len(results) - len(failed)} of {len(results)} are green{note}")
    raise SystemExit(DIFFERENT if failed else EQUAL)


def _print_results(results: list[CheckResult]) -> None:
    """A word and a colour per line (colour only on a terminal), and below a red line its remedy."""
    width = max(len(result.name) for result in results)
    for result in results:
        status = click.style("green", fg="green") if result.ok else click.style("red  ", fg="red")
        print_line(f"  {result.name:<{width}}  {result.what}", style=status)
        if not result.ok:
            print_line(f"       {'':<{width}}  → {result.remedy}")


def _print_plan(rows: list[PlanRow]) -> None:
    first, second = max(len(row.what) for row in rows), max(len(row.figure) for row in rows)
    for row in rows:
        print_line(f"{row.what:<{first}}  {row.figure:>{second}}  {row.source}".rstrip())
    print_line()
