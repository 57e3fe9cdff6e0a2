"""kohaku-delta tensors: two checkpoints, LoKr files or diffusers folders, tensor by tensor; or which file of the
release a file is.
"""

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.verify import compare_tensors as audit
from kohaku_delta.verify import release
from kohaku_delta.verify.compare_tensors import Comparison

LISTED = 10


@click.command(cls=ComparisonCommand)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@click.option(
    "--published", is_flag=True, help="Compare the sha256 of A with what the release published, and with its inputs."
)
@click.option(
    "--params",
    type=click.Path(path_type=Path),
    default="params.yaml",
    show_default=True,
    help="The recipe that has the pins (--published).",
)
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=LISTED,
    show_default=True,
    help="How many of the tensors that differ are listed.",
)
def tensors(a: Path, b: Path | None, published: bool, params: Path, worst: int) -> None:
    """Compare two checkpoints, LoKr files or diffusers folders, tensor by tensor.

    Two LoKr files are compared by what they do, kron(w1, w2). Exit code 0: equal; 1: different; 2: they cannot be
    compared.
    """
    if published == (b is not None):
        raise click.UsageError("Name a second path, or say --published.")
    same = _published(a, params) if published else _print_comparison(a, b, worst)
    raise SystemExit(0 if same else 1)


def _published(path: Path, params: Path) -> bool:
    files = release.published_hashes(recipes.load(params))
    digest = release.file_sha256(path)
    click.echo(f"{path}: {path.stat().st_size:,} bytes, sha256 {digest}")
    found = release.identify_file(digest, files)
    for file in found:
        click.echo(
            f"is {file.name} of {params}"
            + ("" if len(file.sha256) == 64 else f", as far as its {len(file.sha256)} known digits say")
        )
    if not found:
        click.echo(f"is none of {', '.join(file.name for file in files)} of {params}")
        click.echo(
            "the same tensors in another container have another sha256: kohaku-delta tensors A B compares them with the published file itself"
        )
    return bool(found)


def _print_comparison(a: Path, b: Path, worst: int) -> bool:
    found = audit.compare_files(a, b)
    if found.same_bytes:
        click.echo(f"same bytes: {found.tensors:,} tensors")
    elif found.same_tensors and found.by_product:
        click.echo(
            f"same LoKr from other factors: all {found.tensors:,} differences kron(w1, w2) are equal, bit for bit"
        )
    elif found.same_tensors:
        click.echo(f"same tensors in another container: all {found.tensors:,} are equal, bit for bit")
    else:
        click.echo("\n".join(_print_differences(found, a, b, worst)))
    for sentence in found.container:
        click.echo(f"  {sentence}")
    return found.same_tensors


def _print_differences(found: Comparison, a: Path, b: Path, worst: int) -> list[str]:
    what = "differences kron(w1, w2)" if found.by_product else "tensors"
    counts = [
        f"{found.tensors - len(found.differences) - len(found.other_shape):,} of {found.tensors:,} {what} are equal, {len(found.differences):,} differ"
    ]
    counts += [f"{len(names):,} only in {path}" for names, path in zip(found.only, (a, b)) if names]
    counts += [f"{len(found.other_shape):,} of another shape or kind"] if found.other_shape else []
    lines = ["different: " + ", ".join(counts)]
    if found.elements:
        lines.append(
            f"elements: {_share(found.elements - found.unequal, found.elements)} of {found.elements:,} are equal"
        )
    if listed := found.worst(worst):
        lines += [
            f"the {len(listed)} that differ most:",
            f"  {'largest':>9} {'ulp':>11} {'of':>4} {'equal':>11}  tensor",
        ]
        lines += [
            f"  {each.largest:9.3g} {each.ulps:11,} {each.dtype:>4} {_share(each.count - each.unequal, each.count):>11}  {each.name}"
            for each in listed
        ]
    for title, names in (
        (f"only in {a}", found.only[0]),
        (f"only in {b}", found.only[1]),
        ("of another shape or kind", found.other_shape),
    ):
        if names and worst:
            lines += [
                f"{title}:",
                *(f"  {name}" for name in names[:worst]),
                *([f"  … and {len(names) - worst:,} more"] if len(names) > worst else []),
            ]
    return lines


def _share(part: int, whole: int) -> str:
    """Never 100 % where something differs, never 0 % where something is equal."""
    if part in (0, whole) or not whole:
        return "100 %" if part == whole else "0 %"
    return f"{min(max(100 * part / whole, 0.0001), 99.9999):.4f} %"
