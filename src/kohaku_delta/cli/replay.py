"""kohaku-delta replay: a stretch of training computed anew and compared with the journal; or losses alone, from a
milestone.
"""

from pathlib import Path

import click
from tqdm import tqdm

from kohaku_delta import numerics
from kohaku_delta import params as recipes
from kohaku_delta.cli.exit_codes import ComparisonCommand
from kohaku_delta.formats import parquet
from kohaku_delta.verify import replay_training as replays

FILE = click.Path(path_type=Path)


@click.command(cls=ComparisonCommand)
@click.option(
    "--from",
    "first",
    type=click.IntRange(min=0),
    help="The first step that is compared, counted from 0 as in the journal.",
)
@click.option("--to", "last", type=click.IntRange(min=0), help="The last one.")
@click.option(
    "--loss-only", is_flag=True, help="Compare losses alone, forward only and in fp32: needs --lokr, and no card."
)
@click.option("--lokr", type=FILE, help="A milestone's LoKr file (--loss-only).")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where losses are computed (--loss-only).",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Micro-batches of the step (--loss-only).",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which ones: choose your own (--loss-only).",
)
@click.option("--params", type=FILE, default="params.yaml", show_default=True, help="The recipe.")
@click.option(
    "--inputs",
    type=FILE,
    default="build/inputs.json",
    show_default=True,
    help="The verified inputs (tokenizers, tars).",
)
@click.option("--tars", type=FILE, help="The folder of the tars.  [default: that of --inputs]")
@click.option(
    "--base",
    type=FILE,
    default="build/delta-base.safetensors",
    show_default=True,
    help="The checkpoint that was trained on.",
)
@click.option("--posts", type=FILE, default="build/posts.parquet", show_default=True)
@click.option("--captions", type=FILE, default="build/captions.parquet", show_default=True)
@click.option("--schedule", type=FILE, default="build/schedule.parquet", show_default=True)
@click.option("--journal", type=FILE, default="build/journal.parquet", show_default=True, help="What is checked.")
@click.option("--work", type=FILE, help="Where saved states lie.  [default: execution.work]")
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
    """Compute a stretch of training anew, on one device, and compare it with the journal.

    Exit code 0: equal; 1: the first step, lane and tensor that differ are told; 2: it cannot be compared."""
    if (lokr is not None, first is None, last is None) != (loss_only,) * 3:
        raise click.UsageError("Say --from and --to, or --loss-only and --lokr.")
    numerics.prepare()
    recipe, files = recipes.load(params), files | {"tokenizer": None, "tokenizer_2": None}
    if loss_only:
        raise SystemExit(0 if _losses(recipe, files, lokr, device, sample, seed) else 1)
    work = work or Path(recipe.execution.work)
    with tqdm(desc="replay", unit="step", disable=None) as bar:
        for step, difference in replays.replay_steps(recipe, files, work, first, last):
            bar.update()
            if difference:
                bar.close()
                click.echo(f"different: step {step}: {difference}")
                raise SystemExit(1)
    count = last - first + 1
    click.echo(f"equal: {count} steps, {first} to {last}, bit for bit")
    click.echo(replays.confidence(count, parquet.read(files["journal"], ["step"]).num_rows))


def _losses(recipe, files: dict, lokr: Path, device: str, sample: int, seed: int) -> bool:
    step, found = replays.losses(recipe, files, lokr, device, sample, seed)
    for each in found:
        click.echo(
            f"step {step}, place {each.place}: loss {each.ours:.6f}, the journal says {each.journal:.6f} ({each.ours / each.journal - 1:+.2e})"
        )
    distance = replays.rms_relative_error(found)
    inside = distance <= replays.TOLERANCE
    click.echo(
        f"{'equal within tolerance' if inside else 'different'}: {len(found)} losses of step {step} are {distance:.2e} off (root mean square, relative); up to {replays.TOLERANCE:.0e} is rounding"
    )
    return inside
