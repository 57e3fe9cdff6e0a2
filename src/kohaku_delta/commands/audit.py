"""kohaku-delta audit: what can be found out about a rebuild by whoever has it, or its bundle, offline."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics
from kohaku_delta.audit import findings, rebuild
from kohaku_delta.audit.findings import FAIL, SKIP, Finding, tried
from kohaku_delta.audit.rebuild import Rebuild
from kohaku_delta.commands.verdict import Verdict
from kohaku_delta.evidence import digests, pipeline
from kohaku_delta.refusal import Refusal

FILE = click.Path(path_type=Path)
COLOURS = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}


@click.command("audit", cls=Verdict)
@click.argument("target", type=FILE, default=".")
@click.option("--key", type=FILE, help="The signer's public key (PEM): the provenance is verified with it, and not believed without.")
@click.option("--data", is_flag=True, help="Hash the inputs in the mirror too (the release's: 1.3 TB).")
@click.option("--stages", is_flag=True, help="Compute select, filter, caption, merge, schedule and bake anew.")
@click.option("--replay", "count", type=click.IntRange(1), help="Compute so many steps of training anew, drawn at random.")
@click.option("--seed", type=click.IntRange(min=0), help="The seed of that draw: choose your own.")
@click.option("--own", type=FILE, help="A recipe's folder of yours, whose inputs, base and states serve --replay and --stages of a bundle.")
@click.option("--published", type=FILE, help="A folder with the release's published files, to compare tensors with.")
@click.option("--json", "as_json", is_flag=True, help="Say it as JSON.")
def command(
    target: Path, key: Path | None, data: bool, stages: bool, count: int | None, seed: int | None, own: Path | None, published: Path | None, as_json: bool
) -> None:
    """Check a rebuild: a recipe's folder, or a bundle of one.

    A line a check: PASS, FAIL, or SKIP with its reason; then a verdict. Exit code 0: nothing failed; 1: something did; 2: nothing could be looked at."""
    if (count is None) != (seed is None):
        raise click.UsageError("Say --replay and --seed together: a sample is worth something only where nobody could foresee it.")
    numerics.prepare()
    with rebuild.opened(target) as found:
        made = []
        for finding in _all(found, key, data, stages, count, seed or 0, own, published):
            made.append(finding)
            if not as_json:
                click.echo(f"{click.style(finding.status, fg=COLOURS[finding.status])}  {finding.group + '/' + finding.name:18} {finding.said}")
        lock = digests.of(found.folder / pipeline.LOCK, md5=False).sha256
    code, said = findings.verdict(made)
    if as_json:
        listed = [{"group": each.group, "name": each.name, "status": each.status, "said": each.said} for each in made]
        click.echo(
            json.dumps(
                {"target": str(target), "lock": lock, "bundle": found.bundle is not None, "findings": listed, "exit": code, "verdict": said},
                indent=1,
                ensure_ascii=False,
            )
        )
    else:
        click.echo(f"verdict: {said}")
    raise SystemExit(code)


def _all(
    found: Rebuild, key: Path | None, data: bool, stages: bool, count: int | None, seed: int, own: Path | None, published: Path | None
) -> Iterator[Finding]:
    from kohaku_delta.audit import anew, chain, fidelity, locked, recorded, release, sample, states

    if found.bundle:
        yield locked.bundle(found)
    yield locked.declared(found)
    yield locked.parameters(found)
    yield locked.links(found)
    yield from locked.outs(found)
    yield locked.code(found)
    yield locked.libraries(found)
    yield locked.pinned(found)
    yield locked.data(found, data)
    yield from recorded.records(found)
    yield recorded.during(found)
    yield _signed(found, key)
    yield recorded.handed_on(found)
    yield tried("chain", "dataset", chain.dataset, found)
    yield tried("chain", "order", chain.order, found)
    lines, said = chain.journal(found)
    yield from lines
    yield tried("chain", "weights", states.weights, found, said)
    yield tried("lock", "work", states.work, found, said)
    yield from release.checks(found, published)
    yield fidelity.listed(found)
    yield fidelity.untouched(found)
    if stages:
        yield from anew.findings(found, own)
    yield sample.finding(found, said, own, count, seed, lambda steps: tqdm(steps, desc="replay", unit="step", disable=None, file=sys.stderr))


def _signed(found: Rebuild, key: Path | None) -> Finding:
    """The provenance's signature holds, and what was signed is what lies here."""
    from kohaku_delta.audit import archive, provenance, signature

    place = found.folder / archive.PROVENANCE
    if not key:
        return Finding("lock", "provenance", SKIP, "signed, and no --key was named: nothing in it is believed" if place.is_file() else "not signed")
    try:
        signed = provenance.read(signature.verified(place, key), archive.PROVENANCE)
        other = provenance.parted(signed, provenance.statement(found))
    except Refusal as refusal:
        return Finding("lock", "provenance", FAIL, refusal.message)
    return findings.judged(
        "lock",
        "provenance",
        [f"{other} was signed otherwise than it lies here"] if other else [],
        f"signed by the key of {key}, {len(found.records)} stages, and all of it lies here as it was signed",
    )
