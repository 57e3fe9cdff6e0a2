"""kohaku-delta replay: computes a range of training steps again and compares it with the journal."""

from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics, paths
from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import DIFFERENT, EQUAL, ComparisonCommand
from kohaku_delta.cli.stage_command import FILE
from kohaku_delta.errors import UserError
from kohaku_delta.printing import print_line
from kohaku_delta.training.journal import read_journal
from kohaku_delta.verify import replay_training


def count_option(name: str, variable: str, minimum: int, default: int | None = None, help: str | None = None):
    kind = click.IntRange(min=minimum)
    return click.option(name, variable, type=kind, default=default, show_default=default is not None, help=help)


@click.command(cls=ComparisonCommand)
@count_option("--from", "first", 0, help="The first step to compare, counted from 0 as in the journal.")
@count_option("--to", "last", 0, help="The last step.")
@click.option("--loss-only", is_flag=True, help="Compare losses only (forward pass, fp32): needs --lokr, and no GPU.")
@click.option("--lokr", type=FILE, help="A milestone's LoKr file (--loss-only).")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where losses are computed (--loss-only)."
)
@count_option("--sample", "sample", 1, 8, help="How many micro-batches of the step (--loss-only).")
@count_option("--seed", "seed", 0, 0, help="Selects which ones: choose your own (--loss-only).")
@click.option("--params", type=FILE, default="params.yaml", help="The recipe.")
@click.option("--inputs", type=FILE, default=paths.INPUTS, help="The verified inputs (tokenizers, tars).")
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: that of --inputs]")
@click.option("--base", type=FILE, default=paths.BASE, help="The checkpoint that the training started from.")
@click.option("--posts", type=FILE, default=paths.POSTS)
@click.option("--captions", type=FILE, default=paths.CAPTIONS)
@click.option("--schedule", type=FILE, default=paths.SCHEDULE)
@click.option("--journal", type=FILE, default=paths.JOURNAL, help="The journal to check.")
@click.option("--work", type=FILE, help="The folder of the saved states.  [default: execution.work]")
def replay(
    first: int | None,
    last: int | None,
    loss_only: bool,
    lokr: Path | None,
    device: str,
    sample: int,
    seed: int,
    params: Path,
    work: Path | None,
    **files,
) -> None:
    """Compute a range of training steps again, on one device, and compare it with the journal.

    Exit code 0: equal; 1: different, with the first step, lane and tensor that differ; 2: it cannot be compared."""
    numerics.prepare()
    recipe, files = recipes.load(params), files | {"tokenizer": None, "tokenizer_2": None}
    if loss_only and lokr and first is None and last is None:
        raise SystemExit(EQUAL if _compare_losses(recipe, files, lokr, device, sample, seed) else DIFFERENT)
    if loss_only or lokr or first is None or last is None:
        raise click.UsageError("Give --from and --to, or --loss-only and --lokr.")
    if work and not work.is_dir():
        raise UserError(f"{work} is not a folder. Name the folder of the saved states with --work.")
    say = partial(print_line, err=True)
    with tqdm(desc="replay", unit="step", disable=None) as bar:
        steps = replay_training.replay_steps(recipe, files, work or Path(recipe.execution.work), first, last, say)
        for step, difference in steps:
            bar.update()
            if difference:
                bar.close()
                print_line(f"different: step {step}: {difference}")
                raise SystemExit(DIFFERENT)
    count = last - first + 1
    print_line(f"equal: {count} steps, {first} to {last}, bit for bit")
    print_line(replay_training.confidence(count, len(read_journal(files["journal"]).rows)))


def _compare_losses(recipe, files: dict, lokr: Path, device: str, sample: int, seed: int) -> bool:
    """Prints each loss and the verdict; True if they agree within the tolerance."""
    step, losses = replay_training.compare_losses(recipe, files, lokr, device, sample, seed)
    for each in losses:
        error = each.ours / each.journal - 1
        print_line(f"step {step}, place {each.place}: loss {each.ours:.6f}, journal {each.journal:.6f} ({error:+.2e})")
    error = replay_training.rms_relative_error(losses)
    equal = error <= replay_training.TOLERANCE
    print_line(
        f"{'equal within tolerance' if equal else 'different'}: {len(losses)} losses of step {step}, "
        f"relative error {error:.2e} (root mean square); up to {replay_training.TOLERANCE:.0e} is rounding"
    )
    return equal
