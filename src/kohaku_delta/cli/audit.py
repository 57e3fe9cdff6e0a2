"""kohaku-delta audit: checks a rebuild, or its bundle, offline."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics
from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.errors import UserError
from kohaku_delta.formats import path_digests
from kohaku_delta.provenance import bundles, dvc_yaml, signature, statement
from kohaku_delta.verify import (
    artifact,
    check_lock,
    check_records,
    check_release,
    check_training_states,
    consistency,
    findings,
    quirks,
    recompute_stages,
    sampled_replay,
)
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.findings import FAIL, SKIP, Finding, check_or_fail

FILE = click.Path(path_type=Path)
COLORS = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}


@click.command(cls=ComparisonCommand)
@click.argument("target", type=FILE, default=".")
@click.option("--key", type=FILE, help="The signer's public key (PEM). Without it the provenance is not verified.")
@click.option("--data", is_flag=True, help="Hash the inputs in the mirror too (the release's: 1.3 TB).")
@click.option("--stages", is_flag=True, help="Compute select, filter, caption, merge, schedule and bake again.")
@click.option("--replay", "count", type=click.IntRange(1), help="Compute so many random steps of the training again.")
@click.option("--seed", type=click.IntRange(min=0), help="The seed of that random choice: choose your own.")
@click.option(
    "--own",
    type=FILE,
    help="Your own recipe folder: its inputs, base and checkpoints are used for --replay and --stages of a bundle.",
)
@click.option("--published", type=FILE, help="A folder with the release's published files, to compare tensors with.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def audit(
    target: Path,
    key: Path | None,
    data: bool,
    stages: bool,
    count: int | None,
    seed: int | None,
    own: Path | None,
    published: Path | None,
    as_json: bool,
) -> None:
    """Check a rebuild: a recipe's folder, or a bundle of one.

    Prints one line per check: PASS, FAIL, or SKIP with its reason; then a verdict. Exit code 0: nothing failed;
    1: something failed; 2: nothing could be checked.
    """
    if (count is None) != (seed is None):
        raise click.UsageError("Give --replay and --seed together: a sample counts only if nobody could foresee it.")
    numerics.prepare()
    with artifact.open_artifact(target) as rebuild:
        results = []
        for finding in _all_findings(rebuild, key, data, stages, count, seed or 0, own, published):
            results.append(finding)
            if not as_json:
                status = click.style(finding.status, fg=COLORS[finding.status])
                click.echo(f"{status}  {finding.group + '/' + finding.name:18} {finding.said}")
        lock = path_digests.digest_path(rebuild.folder / dvc_yaml.LOCK, md5=False).sha256
    code, verdict = findings.summarize(results)
    if as_json:
        content = {
            "target": str(target),
            "lock": lock,
            "bundle": rebuild.bundle is not None,
            "findings": [
                {"group": each.group, "name": each.name, "status": each.status, "said": each.said} for each in results
            ],
            "exit": code,
            "verdict": verdict,
        }
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        click.echo(f"verdict: {verdict}")
    raise SystemExit(code)


def _all_findings(
    rebuild: Artifact,
    key: Path | None,
    data: bool,
    stages: bool,
    count: int | None,
    seed: int,
    own: Path | None,
    published: Path | None,
) -> Iterator[Finding]:
    if rebuild.bundle:
        yield check_lock.check_bundle(rebuild)
    yield check_lock.check_declarations(rebuild)
    yield check_lock.check_parameters(rebuild)
    yield check_lock.check_links(rebuild)
    yield from check_lock.check_outputs(rebuild)
    yield check_lock.check_code(rebuild)
    yield check_lock.check_libraries(rebuild)
    yield check_lock.check_pins(rebuild)
    yield check_lock.check_data(rebuild, data)
    yield from check_records.check_all_records(rebuild)
    yield check_records.check_unchanged_during_run(rebuild)
    yield _signature_finding(rebuild, key)
    yield check_records.check_stage_links(rebuild)
    yield check_or_fail("chain", "dataset", consistency.check_dataset, rebuild)
    yield check_or_fail("chain", "order", consistency.check_schedule, rebuild)
    lines, journal = consistency.check_journal(rebuild)
    yield from lines
    yield check_or_fail("chain", "weights", check_training_states.check_final_weights, rebuild, journal)
    yield check_or_fail("lock", "work", check_training_states.check_saved_states, rebuild, journal)
    yield from check_release.check_release(rebuild, published)
    yield quirks.quirks_finding(rebuild)
    yield quirks.check_untrained_layer(rebuild)
    if stages:
        yield from recompute_stages.recompute_findings(rebuild, own)
    yield sampled_replay.replay_finding(rebuild, journal, own, count, seed, _progress)


def _progress(steps):
    return tqdm(steps, desc="replay", unit="step", disable=None, file=sys.stderr)


def _signature_finding(rebuild: Artifact, key: Path | None) -> Finding:
    """Whether the provenance's signature is valid, and the signed statement is what the rebuild gives."""
    path = rebuild.folder / bundles.PROVENANCE
    if not key:
        reason = "signed, but not verified without --key" if path.is_file() else "not signed"
        return Finding("lock", "provenance", SKIP, reason)
    try:
        signed = statement.read_statement(signature.verify_signature(path, key), bundles.PROVENANCE)
        difference = statement.first_difference(signed, statement.build_statement(rebuild))
    except UserError as error:
        return Finding("lock", "provenance", FAIL, error.message)
    faults = [f"{difference} differs from what was signed"] if difference else []
    passed = f"signed by the key of {key}: {len(rebuild.records)} stages, all equal to what was signed"
    return findings.pass_or_fail("lock", "provenance", faults, passed)
