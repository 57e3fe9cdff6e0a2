"""kohaku-delta compare: where two rebuilds part, and what differed on their hosts."""

from pathlib import Path

import click

from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.verify import compare_rebuilds

FILE = click.Path(path_type=Path)


@click.command("compare", cls=ComparisonCommand)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
def command(a: Path, b: Path) -> None:
    """Compare two rebuilds, recipe's folders or bundles: the first stage, then the first post, caption, micro-batch,
    step, lane and tensor where they part.

    What stands before “|” is A's. Exit code 0: every out of every stage is equal; 1: they part; 2: they cannot be
    compared.
    """
    with open_artifact(a) as one, open_artifact(b) as other:
        found = compare_rebuilds.differing_outputs(one, other)
        unequal = {name: outs for name, outs in found.items() if outs}
        alone, hosts = compare_rebuilds.stages_in_one_only(one, other), compare_rebuilds.host_differences(one, other)
        if not unequal and not alone:
            count = sum(len(one.stages[name].outs) for name in found)
            click.echo(
                f"equal: all {count} outs of {len(found)} stages, byte for byte"
                + (f"; other on the two hosts: {'; '.join(hosts)}" if hosts else "")
            )
            raise SystemExit(0)
        if unequal:
            first = next(iter(unequal))
            click.echo(f"different from the stage {first} on: {', '.join(unequal[first])}")
            for kind, said in compare_rebuilds.stage_differences(one, other):
                click.echo(f"  {kind:12} {said}")
            equal = ", ".join(name for name in found if name not in unequal) or "no stage"
            click.echo(
                f"  {'outs':12} {sum(map(len, unequal.values()))} differ, of {', '.join(unequal)}; equal are those of {equal}"
            )
        for said in alone:
            click.echo(f"  {'stage':12} {said}")
        for said in (
            hosts
            or ["nothing that the records tell differed"] * bool(one.records and other.records)
            or ["no records of both are there to tell what differed"]
        ):
            click.echo(f"  {'host':12} {said}")
        raise SystemExit(1)
