"""kohaku-delta provenance: signs what was built from what, or verifies such a signature."""

from pathlib import Path

import click

from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.errors import UserError
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import bundles, signature, statement
from kohaku_delta.provenance.artifact import open_artifact


@click.command(cls=ComparisonCommand)
@click.argument("folder", type=FILE, default=".")
@click.option("--key", type=FILE, help="Sign with this private key (PEM; docs/release.md says how to make one).")
@click.option("--verify", type=FILE, help="Verify with this public key (PEM).")
def provenance(folder: Path, key: Path | None, verify: Path | None) -> None:
    """Sign the provenance of a recipe's folder, or verify that of a folder or bundle.

    Writes provenance.json beside dvc.lock: an in-toto statement, SLSA provenance, in a DSSE envelope.

    Exit code 0: signed, or verified and equal to the records; 1: the records differ from it; 2: it cannot be verified.
    """
    with open_artifact(folder) as rebuild:
        path = rebuild.folder / bundles.PROVENANCE
        stages = f"{len(rebuild.records)} of {len(rebuild.stages)} stages"
        if key and not verify:
            if rebuild.bundle:
                raise UserError(f"{folder} is a bundle. Sign it when you pack it: kohaku-delta bundle OUT --key KEY.")
            keyid = signature.sign(statement.build_statement(rebuild), key, path)
            print_line(f"signed by {keyid[:16]}…: {stages} → {path}")
            return
        if key or not verify:
            raise click.UsageError("Give --key to sign, or --verify to check.")
        if difference := statement.signed_difference(rebuild, verify):
            print_line(f"different: {difference} is not what the records say")
            raise SystemExit(DIFFERENT)
        print_line(f"verified: {stages}, signed by {verify}, equal to the records; outputs were not hashed")
        raise SystemExit(EQUAL)
