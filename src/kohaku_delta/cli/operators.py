"""kohaku-delta operators: compares this processor's results, operator by operator, with the expected ones."""

import click

from kohaku_delta import numerics
from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL
from kohaku_delta.cli.version_option import version_option
from kohaku_delta.printing import print_json, print_line
from kohaku_delta.provenance import environment


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print the digests as JSON, as in src/kohaku_delta/numerics/operators.json."
)
def operators(as_json: bool) -> None:
    """Compute every operator of the CPU training on fixed inputs, and compare the digests with the committed ones.

    Exit code 0: all are equal; 1: some differ. To compare two processors, run it on both (docs/processors.md)."""
    numerics.enforce("cpu")
    from kohaku_delta.numerics import operators as measured  # imports torch, so the numerics must be fixed before

    found, expected = measured.digests(), measured.known()
    if as_json:
        print_json(found)
        return
    print_line(f"processor: {ascii(environment.host_facts()['processor'])[1:-1]}")
    differing = [name for name, digest in found.items() if expected.get(name) != digest]
    for name, digest in found.items():
        print_line(f"{'DIFFERS' if name in differing else 'equal  '}  {name:<28}{digest}")
    print_line(f"-        {'torch.sqrt (not used)':<28}{measured.digest(measured.torch_square_roots())}")
    note = f"; these differ: {', '.join(differing)}" if differing else ""
    print_line(f"operators: {len(found) - len(differing)} of {len(found)} are equal{note}")
    raise SystemExit(DIFFERENT if differing else EQUAL)


version_option(operators)
