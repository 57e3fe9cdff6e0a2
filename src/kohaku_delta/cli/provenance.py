"""kohaku-delta provenance: what was built from what, signed; or such a file verified and compared with the records at
hand.
"""

from pathlib import Path

import click

from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.errors import UserError
from kohaku_delta.provenance import bundles, signature, statement
from kohaku_delta.provenance.artifact import open_artifact

FILE = click.Path(path_type=Path)


@click.command("provenance", cls=ComparisonCommand)
@click.argument("folder", type=FILE, default=".")
@click.option("--key", type=FILE, help="Sign with this private key (PEM; openssl genpkey -algorithm ed25519).")
@click.option("--verify", type=FILE, help="Verify with this public key (PEM).")
def command(folder: Path, key: Path | None, verify: Path | None) -> None:
    """Sign the provenance of a recipe's folder, or verify that of a folder or bundle.

    Writes provenance.json beside dvc.lock: an in-toto statement, SLSA provenance, in a DSSE envelope.

    Exit code 0: signed, or verified and equal to what the records give; 1: the records at hand are others; 2: it cannot
    be believed.
    """
    if (key is None) == (verify is None):
        raise click.UsageError("Say --key to sign, or --verify to check.")
    with open_artifact(folder) as found:
        place = found.folder / bundles.PROVENANCE
        if key and found.bundle:
            raise UserError(
                f"{folder} is a bundle, which is signed where it is packed: kohaku-delta bundle OUT --key KEY."
            )
        if key:
            keyid = signature.sign(statement.build_statement(found), key, place)
            click.echo(f"signed by {keyid[:16]}…: {len(found.records)} stages → {place}")
        elif verify:
            other = statement.signed_difference(found, verify)
            click.echo(
                f"different: {other} is not what the records at hand say"
                if other
                else f"verified: {len(found.records)} stages, signed by {verify}, as the records at hand say"
            )
            raise SystemExit(1 if other else 0)
