"""kohaku-delta audit: what can be found out about a rebuild by whoever has it, or its bundle, offline."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics
from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.verify import artifact, findings
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.findings import FAIL, SKIP, Finding, check_or_fail

FILE = click.Path(path_type=Path)
COLOURS = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}


@click.command("audit", cls=ComparisonCommand)
@click.argument("target", type=FILE, default=".")
@click.option(
    "--key",
    type=FILE,
    help="The signer's public key (PEM): the provenance is verified with it, and not believed without.",
)
@click.option("--data", is_flag=True, help="Hash the inputs in the mirror too (the release's: 1.3 TB).")
@click.option("--stages", is_flag=True, help="Compute select, filter, caption, merge, schedule and bake anew.")
@click.option(
    "--replay", "count", type=click.IntRange(1), help="Compute so many steps of training anew, drawn at random."
)
@click.option("--seed", type=click.IntRange(min=0), help="The seed of that draw: choose your own.")
@click.option(
    "--own",
    type=FILE,
    help="A recipe's folder of yours, whose inputs, base and states serve --replay and --stages of a bundle.",
)
@click.option("--published", type=FILE, help="A folder with the release's published files, to compare tensors with.")
@click.option("--json", "as_json", is_flag=True, help="Say it as JSON.")
def command(
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

    A line a check: PASS, FAIL, or SKIP with its reason; then a verdict. Exit code 0: nothing failed; 1: something did;
    2: nothing could be looked at.
    """
    if (count is None) != (seed is None):
        raise click.UsageError(
            "Say --replay and --seed together: a sample is worth something only where nobody could foresee it."
        )
    numerics.prepare()
    with artifact.open_artifact(target) as found:
        made = []
        for finding in _all_findings(found, key, data, stages, count, seed or 0, own, published):
            made.append(finding)
            if not as_json:
                click.echo(
                    f"{click.style(finding.status, fg=COLOURS[finding.status])}  {finding.group + '/' + finding.name:18} {finding.said}"
                )
        lock = hashing.digest_path(found.folder / dvc_yaml.LOCK, md5=False).sha256
    code, said = findings.summarize(made)
    if as_json:
        listed = [{"group": each.group, "name": each.name, "status": each.status, "said": each.said} for each in made]
        click.echo(
            json.dumps(
                {
                    "target": str(target),
                    "lock": lock,
                    "bundle": found.bundle is not None,
                    "findings": listed,
                    "exit": code,
                    "verdict": said,
                },
                indent=1,
                ensure_ascii=False,
            )
        )
    else:
        click.echo(f"verdict: {said}")
    raise SystemExit(code)


def _all_findings(
    found: Artifact,
    key: Path | None,
    data: bool,
    stages: bool,
    count: int | None,
    seed: int,
    own: Path | None,
    published: Path | None,
) -> Iterator[Finding]:
    from kohaku_delta.verify import (
        check_lock,
        check_records,
        check_release,
        check_training_states,
        consistency,
        quirks,
        recompute_stages,
        sampled_replay,
    )

    if found.bundle:
        yield check_lock.check_bundle(found)
    yield check_lock.check_declarations(found)
    yield check_lock.check_parameters(found)
    yield check_lock.check_links(found)
    yield from check_lock.check_outputs(found)
    yield check_lock.check_code(found)
    yield check_lock.check_libraries(found)
    yield check_lock.check_pins(found)
    yield check_lock.check_data(found, data)
    yield from check_records.check_all_records(found)
    yield check_records.check_unchanged_during_run(found)
    yield _signature_finding(found, key)
    yield check_records.check_stage_links(found)
    yield check_or_fail("chain", "dataset", consistency.check_dataset, found)
    yield check_or_fail("chain", "order", consistency.check_schedule, found)
    lines, said = consistency.check_journal(found)
    yield from lines
    yield check_or_fail("chain", "weights", check_training_states.check_final_weights, found, said)
    yield check_or_fail("lock", "work", check_training_states.check_saved_states, found, said)
    yield from check_release.check_release(found, published)
    yield quirks.quirks_finding(found)
    yield quirks.check_untrained_layer(found)
    if stages:
        yield from recompute_stages.recompute_findings(found, own)
    yield sampled_replay.replay_finding(
        found,
        said,
        own,
        count,
        seed,
        lambda steps: tqdm(steps, desc="replay", unit="step", disable=None, file=sys.stderr),
    )


def _signature_finding(found: Artifact, key: Path | None) -> Finding:
    """The provenance's signature holds, and what was signed is what lies here."""
    from kohaku_delta.provenance import bundles, signature, statement

    place = found.folder / bundles.PROVENANCE
    if not key:
        return Finding(
            "lock",
            "provenance",
            SKIP,
            "signed, and no --key was named: nothing in it is believed" if place.is_file() else "not signed",
        )
    try:
        signed = statement.read_statement(signature.verify_signature(place, key), bundles.PROVENANCE)
        other = statement.first_difference(signed, statement.build_statement(found))
    except UserError as refusal:
        return Finding("lock", "provenance", FAIL, refusal.message)
    return findings.pass_or_fail(
        "lock",
        "provenance",
        [f"{other} was signed otherwise than it lies here"] if other else [],
        f"signed by the key of {key}, {len(found.records)} stages, and all of it lies here as it was signed",
    )
