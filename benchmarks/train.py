"""Speed and memory of a training step: what is compared runs on the same micro-batches, alternating in one process; a
figure that was not measured is null.

Run `make bench-train` after `make repro`. On any machine: the miniature's forward and backward with the LoKr computed
from its factors (ours), by LyCORIS's default and by its bypass form; deterministic against not; the loop against bare
forward and backward; the cost of the journal; the gain from workers; and the memory of a full-size step, planned with
fake tensors (memory_plan.py). Figures: work/bench/train.json. `make gpu-check` measures SDXL at full size on a card.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "src"))

from kohaku_delta import numerics

numerics.prepare()

import click
import torch

from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.training import batch_builder, run_inputs, training_context
from kohaku_delta.training.training_context import TrainingContext
from kohaku_delta.training.training_loop import TrainingLoop
from step_timing import (
    FORMS,
    alternate_rounds,
    nondeterministic,
    time_forward_backward,
    time_journal,
    use_bypass_form,
    with_lokr_form,
)

KEYS = ("loop_overhead", "forward_speed_ratio_lycoris", "deterministic_cost", "planned_peak_gib", "journal_cost")


def miniature(recipe, folder: Path, form: str) -> TrainingContext:
    """What the miniature's train stage computes with."""
    build = folder / "build"
    files = {name: build / f"{name}.parquet" for name in ("posts", "captions", "schedule")}
    files |= {
        "base": build / "delta-base.safetensors",
        "inputs": build / "inputs.json",
        "tars": None,
        "tokenizer": None,
        "tokenizer_2": None,
    }
    if not files["schedule"].is_file():
        raise UserError(f"{files['schedule']} is not there. Run `make repro` first: this measures with the miniature.")
    _, tokenizers = run_inputs.load_tokenizers(files)
    made = training_context.build_context(
        with_lokr_form(recipe, form), files, tokenizers, run_inputs.tar_paths(files), "cpu"
    )
    use_bypass_form(made.adapter, form)
    return made


def time_training_loop(recipe, parts: TrainingContext, steps: int, workers: int) -> float:
    """Seconds of the loop's first steps: reading, lanes, optimizer, journal, and what it saves."""
    recipe = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"workers": workers})})
    with tempfile.TemporaryDirectory() as folder:
        loop = TrainingLoop(recipe, parts, Path(folder))
        began = time.perf_counter()
        for done, *_ in loop.run():
            if done == steps:
                break
        return time.perf_counter() - began


def bench_miniature(recipe, folder: Path, rounds: int, steps: int) -> dict:
    """The figures of the miniature, on the CPU."""
    rigs = {form: miniature(recipe, folder, form) for form in FORMS}
    ours = rigs["factors"]
    with tempfile.TemporaryDirectory() as empty:
        rows = [row for step in range(steps) for row in TrainingLoop(recipe, ours, Path(empty)).rows(step)]
    batches = list(batch_builder.load_batches(ours.builder, ours.schedule.combine_chunks(), rows, 0))
    few = batches[:2]
    works = {form: (lambda rig=rig: time_forward_backward(rig, few)) for form, rig in rigs.items()}
    found = alternate_rounds(rounds, works | {"loose": nondeterministic(works["factors"])})
    images = sum(len(batch.pixels) for batch in few)
    click.echo(
        "forward and backward, miniature, CPU: "
        + ", ".join(f"{form} {images / found[form]:.2f} images/s" for form in FORMS)
    )
    click.echo(
        f"  ours is {found['delta'] / found['factors']:.2f} times LyCORIS's default, "
        f"{found['bypass'] / found['factors']:.2f} times its bypass form"
    )
    click.echo(f"  deterministic mode costs {100 * (found['factors'] / found['loose'] - 1):+.1f} %")
    whole = alternate_rounds(
        rounds,
        {
            "bare": lambda: time_forward_backward(ours, batches),
            **{
                f"workers {count}": (lambda count=count: time_training_loop(recipe, ours, steps, count))
                for count in (0, 1, 2)
            },
        },
    )
    best = min(seconds for name, seconds in whole.items() if name != "bare")
    click.echo(
        f"{steps} steps of the loop against bare forward and backward ({whole['bare']:.2f} s): "
        + ", ".join(
            f"{name} {100 * (seconds / whole['bare'] - 1):+.1f} %" for name, seconds in whole.items() if name != "bare"
        )
    )
    with tempfile.TemporaryDirectory() as empty:
        loop = TrainingLoop(recipe, ours, Path(empty))
        next(loop.run())
        cost = statistics.median(time_journal(loop) for _ in range(9)) / (best / steps)
    click.echo(f"the journal takes {100 * cost:.2f} % of a step")
    return {
        "forward_speed_ratio_lycoris": round(found["delta"] / found["factors"], 3),
        "forward_speed_ratio_lycoris_bypass": round(found["bypass"] / found["factors"], 3),
        "deterministic_cost": round(found["factors"] / found["loose"] - 1, 4),
        "loop_overhead": round(best / whole["bare"] - 1, 4),
        "journal_cost": round(cost, 5),
    }


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Turns of each; their median counts.")
@click.option("--steps", default=2, show_default=True, help="Of the miniature's training, for the loop's overhead.")
@click.option(
    "--work", type=click.Path(path_type=Path), default="work/bench", show_default=True, help="Where the figures go."
)
def main(rounds: int, steps: int, work: Path) -> None:
    """Speed and memory of a training step."""
    import memory_plan

    numerics.enforce("cpu")
    torch.manual_seed(0)
    folder = ROOT / "miniature"
    os.chdir(folder)  # as the stages do
    figures = (
        dict.fromkeys(KEYS)
        | {"planned_peak_gib": {}}
        | bench_miniature(params.load(folder / "params.yaml"), folder, rounds, steps)
    )
    schedule = parquet.read(folder / "build" / "schedule.parquet")
    release = params.load(ROOT / "params.yaml")
    for ranks in (1, 2, 4, 8):
        planned = memory_plan.peak_bytes(release, schedule, ranks)
        figures["planned_peak_gib"] |= {str(ranks): round(max(planned.values()) / 2**30, 2)}
        phases = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in planned.items())
        click.echo(f"a full-size step on one of {ranks} cards, GiB at its peak (planned): {phases}")
    click.echo("images/s and memory at full size on a CUDA card: `make gpu-check`")
    work = ROOT / work
    work.mkdir(parents=True, exist_ok=True)
    (work / "train.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(f"→ {work / 'train.json'}")


if __name__ == "__main__":
    main()
