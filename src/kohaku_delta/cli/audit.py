"""kohaku-delta audit: check a rebuild or its bundle, offline."""

import sys
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics
from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.formats import hashing
from kohaku_delta.printing import print_json, print_line, printable
from kohaku_delta.provenance import dvc_yaml, signature
from kohaku_delta.provenance.artifact import open_artifact

COLORS = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}


@click.command(cls=ComparisonCommand)
@click.argument("target", type=FILE, default=".")
@click.option(
    "--key", type=FILE, help="The signer's public key (PEM); without it the provenance is neither verified nor trusted."
)
@click.option("--data", is_flag=True, help="Hash the inputs in the mirror too (the release's: 1.3 TB).")
@click.option("--stages", is_flag=True, help="Compute every stage again but download and train.")
@click.option("--replay", type=click.IntRange(1), help="Train this many steps again, drawn at random.")
@click.option("--seed", type=click.IntRange(min=0), help="The seed of that draw: choose your own.")
@click.option(
    "--own",
    type=FILE,
    help="Your own recipe folder, with the inputs, base and states that --replay and --stages of a bundle need.",
)
@click.option("--published", type=FILE, help="A folder with the release's published files, to compare tensors with.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def audit(target: Path, as_json: bool, **options) -> None:
    """Check a rebuild: a recipe's folder, a bundle of one, or the folder that it publishes (release/).

    Prints one line per check, PASS, FAIL, or SKIP with its reason, then a verdict. Exit code 0: nothing failed; 1:
    something did; 2: nothing could be checked.
    """
    if (options["replay"] is None) != (options["seed"] is None):
        raise click.UsageError(
            "Give --replay and --seed together: a sample only means something if nobody could foresee it."
        )
    if options["key"] and not options["key"].is_fifo():  # a mistyped path is no fault of the target
        signature.read_public_key(options["key"])
    numerics.prepare()
    from kohaku_delta.publishing import check_folder
    from kohaku_delta.verify import audit as checks
    from kohaku_delta.verify import findings  # here: numpy reads the environment when it is imported

    made: list[findings.Finding] = []
    lock_sha256, is_bundle, unseen = None, False, None
    if check_folder.is_published_folder(target):
        if unfit := [f"--{name}" for name, value in options.items() if value and name != "key"]:
            raise click.UsageError(f"{target} is a published folder: {unfit[0]} needs a recipe's folder or a bundle.")
        for finding in check_folder.audit_folder(target, options["key"]):
            _report(finding, made, as_json)
    else:
        progress = partial(tqdm, desc="replay", unit="step", disable=None, file=sys.stderr)
        with open_artifact(target) as rebuild:
            for finding in checks.audit(rebuild, **options, progress=progress):
                _report(finding, made, as_json)
            lock_sha256 = hashing.digest_path(rebuild.folder / dvc_yaml.LOCK, md5=False).sha256
            is_bundle = rebuild.bundle is not None
            unseen = checks.describe_unseen(rebuild, made)
    exit_code, verdict = findings.summarize(made)
    if as_json:
        content = {
            "target": printable(str(target)),
            "lock": lock_sha256,
            "bundle": is_bundle,
            "findings": [
                {
                    "group": finding.group,
                    "name": finding.name,
                    "status": finding.status,
                    "said": printable(finding.message),
                }
                for finding in made
            ],
            "unseen": None if unseen is None else printable(unseen),
            "exit": exit_code,
            "verdict": verdict,
        }
        print_json(content)
    else:
        if unseen is not None:
            print_line(f"not looked at: {unseen or 'nothing: every output was compared with what it was made of'}")
        print_line(f"verdict: {verdict}")
    raise SystemExit(exit_code)


def _report(finding, made: list, as_json: bool) -> None:
    made.append(finding)
    if not as_json:
        status = click.style(finding.status, fg=COLORS[finding.status])
        print_line(f"  {finding.group + '/' + finding.name:18} {finding.message}", style=status)
