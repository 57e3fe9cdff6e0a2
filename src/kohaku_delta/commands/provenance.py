"""kohaku-delta provenance: what was built from what, signed; or such a file verified and compared with the records at hand."""

from pathlib import Path

import click

from kohaku_delta.audit import archive, provenance, rebuild, signature
from kohaku_delta.commands.verdict import Verdict
from kohaku_delta.refusal import Refusal

FILE = click.Path(path_type=Path)


@click.command("provenance", cls=Verdict)
@click.argument("folder", type=FILE, default=".")
@click.option("--key", type=FILE, help="Sign with this private key (PEM; openssl genpkey -algorithm ed25519).")
@click.option("--verify", type=FILE, help="Verify with this public key (PEM).")
def command(folder: Path, key: Path | None, verify: Path | None) -> None:
    """Sign the provenance of a recipe's folder, or verify that of a folder or bundle.

    Writes provenance.json beside dvc.lock: an in-toto statement, SLSA provenance, in a DSSE envelope.

    Exit code 0: signed, or verified and equal to what the records give; 1: the records at hand are others; 2: it cannot be believed."""
    if (key is None) == (verify is None):
        raise click.UsageError("Say --key to sign, or --verify to check.")
    with rebuild.opened(folder) as found:
        place = found.folder / archive.PROVENANCE
        if key and found.bundle:
            raise Refusal(f"{folder} is a bundle, which is signed where it is packed: kohaku-delta bundle OUT --key KEY.")
        if key:
            keyid = signature.sign(provenance.statement(found), key, place)
            click.echo(f"signed by {keyid[:16]}…: {len(found.records)} stages → {place}")
            return
        signed = provenance.read(signature.verified(place, verify), archive.PROVENANCE)
        other = provenance.parted(signed, provenance.statement(found))
        click.echo(
            f"different: {other} is not what the records at hand say"
            if other
            else f"verified: {len(found.records)} stages, signed by {verify}, as the records at hand say"
        )
        raise SystemExit(1 if other else 0)
