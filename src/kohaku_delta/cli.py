"""kohaku-delta: what a person asks of files, beside the pipeline. `kohaku-delta tensors A B`, `kohaku-delta replay`; `make repro` installs it in .venv/bin."""

from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics, table
from kohaku_delta import params as recipes
from kohaku_delta.audit import published as pins
from kohaku_delta.audit import replay as replays
from kohaku_delta.audit import tensors as audit
from kohaku_delta.audit.tensors import Comparison
from kohaku_delta.refusal import Refusal
from kohaku_delta.stage import Stage

LISTED = 10
FILE = click.Path(path_type=Path)


class Verdict(Stage):
    """A command that ends with 0 (equal), 1 (different) or 2 (cannot be compared)."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except Refusal as refusal:
            refusal.exit_code = 2
            raise


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Ask about checkpoints, LoKr files and folders of the recipe."""


@main.command(cls=Verdict)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@click.option("--published", is_flag=True, help="Compare the sha256 of A with what the release published, and with its inputs.")
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True, help="The recipe that has the pins (--published).")
@click.option("--worst", type=click.IntRange(min=0), default=LISTED, show_default=True, help="How many of the tensors that differ are listed.")
def tensors(a: Path, b: Path | None, published: bool, params: Path, worst: int) -> None:
    """Compare two checkpoints, LoKr files or diffusers folders, tensor by tensor.

    Two LoKr files are compared by what they do, kron(w1, w2). Exit code 0: equal; 1: different; 2: they cannot be compared."""
    if published == (b is not None):
        raise click.UsageError("Name a second path, or say --published.")
    same = _published(a, params) if published else _compared(a, b, worst)
    raise SystemExit(0 if same else 1)


@main.command(cls=Verdict)
@click.option("--from", "first", type=click.IntRange(min=0), help="The first step that is compared, counted from 0 as in the journal.")
@click.option("--to", "last", type=click.IntRange(min=0), help="The last one.")
@click.option("--loss-only", is_flag=True, help="Compare losses alone, forward only and in fp32: needs --lokr, and no card.")
@click.option("--lokr", type=FILE, help="A milestone's LoKr file (--loss-only).")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where losses are computed (--loss-only).")
@click.option("--sample", type=click.IntRange(min=1), default=8, show_default=True, help="Micro-batches of the step (--loss-only).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which ones: choose your own (--loss-only).")
@click.option("--params", type=FILE, default="params.yaml", show_default=True, help="The recipe.")
@click.option("--inputs", type=FILE, default="build/inputs.json", show_default=True, help="The verified inputs (tokenizers, tars).")
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: that of --inputs]")
@click.option("--base", type=FILE, default="build/delta-base.safetensors", show_default=True, help="The checkpoint that was trained on.")
@click.option("--posts", type=FILE, default="build/posts.parquet", show_default=True)
@click.option("--captions", type=FILE, default="build/captions.parquet", show_default=True)
@click.option("--schedule", type=FILE, default="build/schedule.parquet", show_default=True)
@click.option("--journal", type=FILE, default="build/journal.parquet", show_default=True, help="What is checked.")
@click.option("--work", type=FILE, help="Where saved states lie.  [default: train.work]")
def replay(first: int | None, last: int | None, loss_only: bool, lokr: Path | None, device: str, sample: int, seed: int, params: Path, work: Path | None, **files) -> None:
    """Compute a stretch of training anew, on one device, and compare it with the journal.

    Exit code 0: equal; 1: the first step, lane and tensor that differ are told; 2: it cannot be compared."""
    if (lokr is not None, first is None, last is None) != (loss_only,) * 3:
        raise click.UsageError("Say --from and --to, or --loss-only and --lokr.")
    numerics.prepare()
    recipe, files = recipes.load(params), files | {"tokenizer": None, "tokenizer_2": None}
    if loss_only:
        raise SystemExit(0 if _losses(recipe, files, lokr, device, sample, seed) else 1)
    work = work or Path(recipe.train.work)
    with tqdm(desc="replay", unit="step", disable=None) as bar:
        for step, difference in replays.replay(recipe, files, work, first, last):
            bar.update()
            if difference:
                bar.close()
                click.echo(f"different: step {step}: {difference}")
                raise SystemExit(1)
    count = last - first + 1
    click.echo(f"equal: {count} steps, {first} to {last}, bit for bit")
    click.echo(_confidence(count, table.read(files["journal"], ["step"]).num_rows))


def _confidence(done: int, steps: int) -> str:
    """What a random sample of so many of all steps shows: 1 − (1 − share)^done ≥ 95 % where share = 1 − 0.05^(1/done)."""
    share = 1 - 0.05 ** (1 / done)
    return (
        f"{done} of {steps:,} steps were computed anew. Had they been drawn at random, a journal with {100 * share:.1f} % of its steps false would have been found "
        f"with 95 % probability; one false step among all, with {100 * done / steps:.1f} %."
    )


def _losses(recipe, files: dict, lokr: Path, device: str, sample: int, seed: int) -> bool:
    step, found = replays.losses(recipe, files, lokr, device, sample, seed)
    for each in found:
        click.echo(f"step {step}, place {each.place}: loss {each.ours:.6f}, the journal says {each.journal:.6f} ({each.ours / each.journal - 1:+.2e})")
    distance = replays.distance(found)
    inside = distance <= replays.TOLERANCE
    click.echo(f"{'equal within tolerance' if inside else 'different'}: {len(found)} losses of step {step} are {distance:.2e} off (root mean square, relative); up to {replays.TOLERANCE:.0e} is rounding")
    return inside


def _published(path: Path, params: Path) -> bool:
    files = pins.known(recipes.load(params))
    digest = pins.sha256(path)
    click.echo(f"{path}: {path.stat().st_size:,} bytes, sha256 {digest}")
    found = pins.identify(digest, files)
    for file in found:
        click.echo(f"is {file.name} of {params}" + ("" if len(file.sha256) == 64 else f", as far as its {len(file.sha256)} known digits say"))
    if not found:
        click.echo(f"is none of {', '.join(file.name for file in files)} of {params}")
        click.echo("the same tensors in another container have another sha256: kohaku-delta tensors A B compares them with the published file itself")
    return bool(found)


def _compared(a: Path, b: Path, worst: int) -> bool:
    found = audit.compare(a, b)
    if found.same_bytes:
        click.echo(f"same bytes: {found.tensors:,} tensors")
    elif found.same_tensors and found.by_product:
        click.echo(f"same LoKr from other factors: all {found.tensors:,} differences kron(w1, w2) are equal, bit for bit")
    elif found.same_tensors:
        click.echo(f"same tensors in another container: all {found.tensors:,} are equal, bit for bit")
    else:
        click.echo("\n".join(_differences(found, a, b, worst)))
    for sentence in found.container:
        click.echo(f"  {sentence}")
    return found.same_tensors


def _differences(found: Comparison, a: Path, b: Path, worst: int) -> list[str]:
    what = "differences kron(w1, w2)" if found.by_product else "tensors"
    counts = [f"{found.tensors - len(found.differences) - len(found.other_shape):,} of {found.tensors:,} {what} are equal, {len(found.differences):,} differ"]
    counts += [f"{len(names):,} only in {path}" for names, path in zip(found.only, (a, b)) if names]
    counts += [f"{len(found.other_shape):,} of another shape or kind"] if found.other_shape else []
    lines = ["different: " + ", ".join(counts)]
    if found.elements:
        lines.append(f"elements: {_share(found.elements - found.unequal, found.elements)} of {found.elements:,} are equal")
    if listed := found.worst(worst):
        lines += [f"the {len(listed)} that differ most:", f"  {'largest':>9} {'ulp':>11} {'of':>4} {'equal':>11}  tensor"]
        lines += [f"  {each.largest:9.3g} {each.ulps:11,} {each.dtype:>4} {_share(each.count - each.unequal, each.count):>11}  {each.name}" for each in listed]
    for title, names in ((f"only in {a}", found.only[0]), (f"only in {b}", found.only[1]), ("of another shape or kind", found.other_shape)):
        if names and worst:
            lines += [f"{title}:", *(f"  {name}" for name in names[:worst]), *([f"  … and {len(names) - worst:,} more"] if len(names) > worst else [])]
    return lines


def _share(part: int, whole: int) -> str:
    """Never 100 % where something differs, never 0 % where something is equal."""
    if part in (0, whole) or not whole:
        return "100 %" if part == whole else "0 %"
    return f"{min(max(100 * part / whole, 0.0001), 99.9999):.4f} %"
