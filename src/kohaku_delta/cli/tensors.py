"""kohaku-delta tensors: compares two checkpoints, LoKr files or diffusers folders, or identifies a published file."""

from pathlib import Path

import click

from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.printing import print_line
from kohaku_delta.verify import check_release, compare_tensors
from kohaku_delta.verify.compare_tensors import Comparison


@click.command(cls=ComparisonCommand)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE, required=False)
@click.option(
    "--published", is_flag=True, help="Compare the sha256 of A with those of the release's files and of its inputs."
)
@click.option("--params", type=FILE, default="params.yaml", help="The recipe that has the pins (--published).")
@click.option("--worst", type=click.IntRange(min=0), default=10, help="How many of the differing tensors to list.")
def tensors(a: Path, b: Path | None, published: bool, params: Path, worst: int) -> None:
    """Compare two checkpoints, LoKr files or diffusers folders, tensor by tensor.

    LoKr files are compared by their product kron(w1, w2). Exit code 0: equal; 1: different; 2: they cannot be compared.
    """
    if published and b is None:
        equal = _identify(a, params)
    elif b is not None and not published:
        equal = _compare(a, b, worst)
    else:
        raise click.UsageError("Give a second path, or --published.")
    raise SystemExit(EQUAL if equal else DIFFERENT)


def _identify(path: Path, params: Path) -> bool:
    files = check_release.published_hashes(recipes.load(params))
    digest = check_release.file_sha256(path)
    print_line(f"{path}: {path.stat().st_size:,} bytes, sha256 {digest}")
    matches = check_release.identify_file(digest, files)
    for file in matches:
        note = "" if len(file.sha256) == 64 else f", by the {len(file.sha256)} digits that are known"
        print_line(f"is {file.name} of {params}{note}")
    if not matches:
        print_line(f"is not one of {', '.join(file.name for file in files)} of {params}")
        print_line(
            "The same tensors in another container have another sha256: "
            "kohaku-delta tensors A B compares with the published file itself."
        )
    return bool(matches)


def _compare(a: Path, b: Path, worst: int) -> bool:
    found = compare_tensors.compare_files(a, b)
    if found.same_bytes:
        lines = [f"same bytes: {found.tensors:,} tensors"]
    elif found.same_tensors and found.by_product:
        lines = [f"same LoKr from other factors: all {found.tensors:,} differences kron(w1, w2) are equal, bit for bit"]
    elif found.same_tensors:
        lines = [f"same tensors in another container: all {found.tensors:,} are equal, bit for bit"]
    elif found.only_dtype:
        lines = [_only_dtype(found, a, b)]
    else:
        lines = _differences(found, a, b, worst)
    for line in [*lines, *(f"  {sentence}" for sentence in found.container)]:
        print_line(line)
    return found.same_tensors


def _only_dtype(found: Comparison, a: Path, b: Path) -> str:
    pairs = sorted({each.cast for each in found.differences if each.cast})
    kinds = ", ".join(f"{one} in {a} and {other} in {b}" for one, other in pairs)
    rounded = " once it is rounded to the coarser dtype" if found.unequal else ""
    count = len(found.differences)
    return f"only the dtype differs: {count:,} of {found.tensors:,} tensors are {kinds}; every value is equal{rounded}"


def _differences(found: Comparison, a: Path, b: Path, worst: int) -> list[str]:
    what = "differences kron(w1, w2)" if found.by_product else "tensors"
    equal = found.tensors - len(found.differences) - len(found.other_shape)
    counts = [f"{equal:,} of {found.tensors:,} {what} are equal, {len(found.differences):,} differ"]
    counts += [f"{len(names):,} only in {path}" for names, path in zip(found.only, (a, b), strict=True) if names]
    counts += [f"{len(found.other_shape):,} of another shape or kind"] if found.other_shape else []
    lines = ["different: " + ", ".join(counts)]
    if found.elements:
        share = _share(found.elements - found.unequal, found.elements)
        lines.append(f"elements: {share} of {found.elements:,} are equal")
    if listed := found.worst(worst):
        lines.append(f"the {len(listed)} that differ most:")
        lines.append(f"  {'largest':>9} {'ulp':>11} {'of':>4} {'equal':>11}  tensor")
        for each in listed:
            share = _share(each.count - each.unequal, each.count)
            lines.append(f"  {each.largest:9.3g} {each.ulps:11,} {each.dtype:>4} {share:>11}  {each.name}")
    names_by_title = {
        f"only in {a}": found.only[0],
        f"only in {b}": found.only[1],
        "of another shape or kind": found.other_shape,
    }
    for title, names in names_by_title.items():
        if names and worst:
            lines += [f"{title}:", *(f"  {name}" for name in names[:worst])]
            lines += [f"  … and {len(names) - worst:,} more"] if len(names) > worst else []
    return lines


def _share(part: int, whole: int) -> str:
    """A percentage: never 100 % if something differs, never 0 % if something is equal."""
    if part in (0, whole) or not whole:
        return "100 %" if part == whole else "0 %"
    return f"{min(max(100 * part / whole, 0.0001), 99.9999):.4f} %"
