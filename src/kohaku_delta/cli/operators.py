"""kohaku-delta operators: the bits of this processor, operator by operator, against those that every processor should
give.
"""

import json

import click

from kohaku_delta import numerics
from kohaku_delta.provenance import environment


@click.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the digests as JSON, as they lie in src/kohaku_delta/numerics/operators.json.",
)
def operators(as_json: bool) -> None:
    """Compute every operator of the CPU training on fixed inputs, and compare the digests with the committed ones.

    Exit code 0: all equal; 1: some differ. To compare two processors, run it on both (docs/processors.md)."""
    numerics.enforce("cpu")
    from kohaku_delta.numerics import operators as measured  # imports torch, which must find the numerics fixed

    found = measured.digests()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    known = measured.known()
    click.echo(f"processor: {ascii(environment.host_facts()['processor'])[1:-1]}")
    for name, digest in found.items():
        click.echo(f"{'equal  ' if known.get(name) == digest else 'DIFFERS'}  {name:<28}{digest}")
    click.echo(f"-        {'torch.sqrt (not used)':<28}{measured.digest(measured.torch_square_roots())}")
    differing = [name for name, digest in found.items() if known.get(name) != digest]
    click.echo(
        f"operators: {len(found) - len(differing)} of {len(found)} are equal"
        + (f"; these differ: {', '.join(differing)}" if differing else "")
    )
    raise SystemExit(bool(differing))
