"""kohaku-delta compare: where two rebuilds start to differ, and what differs between their hosts."""

from pathlib import Path

import click

from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.printing import print_line
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.verify import compare_rebuilds


@click.command(cls=ComparisonCommand)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
def compare(a: Path, b: Path) -> None:
    """Compare two rebuilds, recipe folders or bundles: the first stage, post, caption, micro-batch, step, lane and
    tensor that differ.

    Values before “|” are those of A. Exit code 0: every output of every stage is equal; 1: some differ; 2: they cannot
    be compared.
    """
    with open_artifact(a) as one, open_artifact(b) as other:
        outputs = compare_rebuilds.differing_outputs(one, other)
        unequal = {name: outs for name, outs in outputs.items() if outs}
        unmatched = compare_rebuilds.stages_in_one_only(one, other)
        hosts = compare_rebuilds.host_differences(one, other)
        if not unequal and not unmatched:
            count = sum(len(one.stages[name].outs) for name in outputs)
            note = f"; the hosts differ: {'; '.join(hosts)}" if hosts else ""
            print_line(f"equal: all {count} outputs of {len(outputs)} stages, byte for byte{note}")
            raise SystemExit(EQUAL)
        if unequal:
            first = next(iter(unequal))
            print_line(f"different from the stage {first} on: {', '.join(unequal[first])}")
            for kind, difference in compare_rebuilds.stage_differences(one, other):
                _row(kind, difference)
            equal = ", ".join(name for name in outputs if name not in unequal) or "no stage"
            count = sum(map(len, unequal.values()))
            _row("outputs", f"{count} differ, of {', '.join(unequal)}; equal are those of {equal}")
        for difference in unmatched:
            _row("stage", difference)
        if not hosts:
            both = one.records and other.records
            hosts = ["no recorded difference" if both else "unknown: the records of one are missing"]
        for difference in hosts:
            _row("host", difference)
        raise SystemExit(DIFFERENT)


def _row(kind: str, text: str) -> None:
    print_line(f"  {kind:12} {text}")
