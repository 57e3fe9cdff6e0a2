"""kohaku-delta compare: where two rebuilds start to differ, and what differs between their hosts."""

from itertools import chain
from pathlib import Path
from typing import NoReturn

import click

from kohaku_delta.cli.exit_codes import CANNOT_COMPARE, DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.printing import format_some, print_line
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.verify import compare_rebuilds, compare_statement
from kohaku_delta.verify.compare_rebuilds import OutputComparison


@click.command(cls=ComparisonCommand)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--key", type=FILE, help="The public key (PEM) of B's signer, if B is a signed provenance (.json).")
def compare(a: Path, b: Path, key: Path | None) -> None:
    """Compare two rebuilds, recipe folders or bundles: the first stage, post, caption, micro-batch, step, lane and
    tensor that differ.

    Values before “|” are those of A. Equal is what was hashed on both sides; of weights that a bundle leaves out, only
    what its dvc.lock claims is compared, and that is said. Exit code 0: every output of every stage is equal; 1: some
    differ; 2: they cannot be compared, or not wholly.

    B may be the signed provenance of a known rebuild (rebuilds/NAME.json, with --key rebuilds/NAME.pub): the outputs of
    A are hashed, and compared with what was signed. Other code with equal outputs is equal, and said.
    """
    if b.suffix == ".json":
        if not key:
            raise click.UsageError(f"{b} is a signed provenance: name its signer's public key with --key.")
        compare_signed(a, b, key)
    if key:
        raise click.UsageError(
            "--key is for a signed provenance (.json) as B. A folder or bundle is compared as it is."
        )
    with open_artifact(a) as one, open_artifact(b) as other:
        found = compare_rebuilds.compare_outputs(one, other)
        unmatched = compare_rebuilds.stages_in_one_only(one, other)
        unfinished = compare_rebuilds.unfinished_stages(one, other)
        hosts = compare_rebuilds.host_differences(one, other)
        count = sum(map(len, found.equal.values()))
        if not found.unequal and not unmatched:
            print_line(
                _verdict(found, count, unfinished) + (f"; the hosts differ: {'; '.join(hosts)}" if hosts else "")
            )
            raise SystemExit(CANNOT_COMPARE if found.unknown or unfinished or not count else EQUAL)
        if found.unequal:
            first = next(iter(found.unequal))
            print_line(f"different from the stage {first} on: {', '.join(found.unequal[first])}")
            for kind, difference in compare_rebuilds.stage_differences(one, other):
                _row(kind, difference)
            equal = ", ".join(found.equal_stages) or "no stage"
            unequal = sum(map(len, found.unequal.values()))
            _row("outputs", f"{unequal} differ, of {', '.join(found.unequal)}; equal are those of {equal}")
        for outs, what in ((found.claimed, "only claimed to be equal"), (found.unknown, "not hashed on both sides")):
            if outs:
                _row(what, format_some(chain(*outs.values())))
        for difference in unmatched:
            _row("stage", difference)
        if not hosts:
            both = one.records and other.records
            hosts = ["no recorded difference" if both else "unknown: the records of one are missing"]
        for difference in hosts:
            _row("host", difference)
        raise SystemExit(DIFFERENT)


def _verdict(found: OutputComparison, count: int, unfinished: list[str]) -> str:
    """The sentence for two rebuilds of which no output is known to differ."""
    hashed = f"{count} outputs of {len(found.equal)} stages"
    claims = ", ".join(chain(*found.claimed.values()))
    claimed = f"; weights that are only claimed to be equal, by dvc.lock: {claims}" if claims else ""
    if not (found.unknown or unfinished or not count):
        return f"equal: {'' if claims else 'all '}{hashed}, byte for byte{claimed}"
    faults = [f"not hashed on both sides: {', '.join(chain(*found.unknown.values()))}"] if found.unknown else []
    faults += [f"no stage {', '.join(unfinished)} in either dvc.lock"] if unfinished else []
    return f"cannot be judged: {'; '.join(faults) or 'nothing was hashed'}; equal, byte for byte, are {hashed}{claimed}"


def compare_signed(a: Path, b: Path, key: Path) -> NoReturn:
    """Compare a rebuild with a signed provenance, and exit."""
    with open_artifact(a) as rebuild:
        signed = compare_statement.read_signed(b, key)
        differing = compare_statement.differing_outputs(rebuild, signed)
        code = list(filter(compare_statement.describes_code, chain(*differing.values())))
        unequal = {name: rest for name, outs in differing.items() if (rest := [out for out in outs if out not in code])}
        unmatched = compare_statement.unmatched_outputs(rebuild, signed)
        rows = [("outputs", line) for line in unmatched] + list(compare_statement.causes(rebuild, signed))
        stages = signed.stages
        if code:
            rows.insert(0, ("code", f"other code was run: {format_some(code)}"))
        if unequal:
            print_line(f"different from the stage {next(iter(unequal))} on: {', '.join(chain(*unequal.values()))}")
            equal = ", ".join(name for name in stages if name not in unequal) or "no stage"
            rows.insert(0, ("outputs", f"{sum(map(len, unequal.values()))} differ; equal are those of {equal}"))
        elif unmatched:
            print_line("cannot be judged: no output differs, but not all could be compared")
        else:
            count = sum(map(len, stages.values())) - len(code)
            outputs = f"{count} outputs" if code else f"all {count} outputs of {len(stages)} stages"
            print_line(f"equal: {outputs} have the sha256 that {key} signed")
        for kind, text in rows:
            _row(kind, text)
    raise SystemExit(DIFFERENT if unequal else CANNOT_COMPARE if unmatched else EQUAL)


def _row(kind: str, text: str) -> None:
    print_line(f"  {kind:12} {text}")
