"""Speed and memory of a training step: what is compared runs on the same micro-batches, alternating in one process; a
figure that was not measured is null.

Run `make bench-train` after `make repro`. On any machine: the miniature's forward and backward with the LoKr computed
from its factors (ours), by LyCORIS's default and by its bypass form; deterministic against not; the loop against bare
forward and backward; the cost of the journal; the gain from workers; and the memory of a full-size step, planned with
fake tensors (memory_plan.py). On a CUDA card also one micro-batch of SDXL at full size, with random weights. Figures:
work/bench/train.json.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from kohaku_delta.training import batch_builder, journal, tensor_fingerprints, trainer
from kohaku_delta.training.training_loop import TrainingContext, TrainingLoop

FORMS = ("factors", "delta", "bypass")
KEYS = (
    "loop_overhead",
    "forward_speed_ratio_lycoris",
    "deterministic_cost",
    "peak_gib",
    "planned_peak_gib",
    "images_per_second",
    "journal_cost",
)


def with_lokr_form(recipe, form: str):
    """The recipe with the LoKr computed in this way."""
    return recipe.model_copy(
        update={"lokr": recipe.lokr.model_copy(update={"forward": "factors" if form == "factors" else "delta"})}
    )


def use_bypass_form(adapter, form: str) -> None:
    if form == "bypass":
        for entry in adapter.entries.values():
            if hasattr(entry, "lokr_w1"):
                entry.bypass_mode = True


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
    _, texts = trainer.load_tokenizers(files)
    made = trainer.build_context(with_lokr_form(recipe, form), files, texts, trainer.tar_paths(files), "cpu")
    use_bypass_form(made.adapter, form)
    return made


def time_forward_backward(parts: TrainingContext, batches: list) -> float:
    """Seconds of forward and backward of these micro-batches."""
    cuda = parts.model.device == "cuda"
    began = time.perf_counter()
    for batch in batches:
        parts.model.losses(batch).mean().backward()
        for _, weight in parts.adapter.trained():
            weight.grad = None
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate_rounds(rounds: int, works: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median seconds of each, after one turn that is not counted."""
    found = {name: [work() for _ in range(1)] for name, work in works.items()}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(work())
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def nondeterministic(work: Callable[[], float]) -> Callable[[], float]:
    """The same without torch's deterministic mode."""

    def loose() -> float:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        try:
            return work()
        finally:
            torch.backends.cudnn.deterministic = True
            torch.use_deterministic_algorithms(True)

    return loose


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


def time_journal(loop: TrainingLoop) -> float:
    """Seconds that a step's journal row takes, its fingerprints included."""
    lane = torch.zeros(sum(weight.numel() for _, weight in loop.trained), device=loop.model.device)
    began = time.perf_counter()
    for _ in loop.lanes:
        tensor_fingerprints.tensor_fingerprint(lane)
    weights = tensor_fingerprints.fingerprints(loop.adapter.tensors())
    (
        tensor_fingerprints.combine(weights),
        tensor_fingerprints.combine(tensor_fingerprints.fingerprints(loop.optimizer.tensors())),
        tensor_fingerprints.short_fingerprints(weights),
    )
    journal.visits_digest(loop.micro_batches(0).to_pylist())
    if loop.model.device == "cuda":
        torch.cuda.synchronize()
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


def bench_full_size(recipe, rounds: int, schedule) -> dict:
    """The figures of one micro-batch of SDXL at full size on a card, in place of the miniature's."""
    import memory_plan

    batch = memory_plan.batch(recipe.schedule.batch_size, recipe.model.side, recipe.train.max_token_length)
    seconds = {}
    for form in FORMS:
        parts = TrainingContext(*memory_plan.models(with_lokr_form(recipe, form), "cuda"), None, schedule, {})
        use_bypass_form(parts.adapter, form)
        torch.cuda.reset_peak_memory_stats()
        once = partial(time_forward_backward, parts, [batch])
        seconds |= alternate_rounds(rounds, {form: once})
        if form == "factors":
            seconds |= alternate_rounds(rounds, {"loose": nondeterministic(once)})
        click.echo(
            f"{form}: {recipe.schedule.batch_size / seconds[form]:.2f} images/s, "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB without the lanes' buffers"
        )
        if form == "factors":
            loop = TrainingLoop(recipe, parts, Path("."))
            for _ in loop.lanes:
                loop.lane_gradient(1, iter([batch]), 1, [])
            gradient = loop.lane_gradient(1, iter([batch]), 1, [])
            loop.optimizer.step(0, gradient, loop.scaler)
            peak = torch.cuda.max_memory_allocated() / 2**30
            cost = statistics.median(time_journal(loop) for _ in range(3)) / (
                recipe.schedule.micro_batches * seconds[form]
            )
            del loop, gradient
        del parts, once
        torch.cuda.empty_cache()
    return {
        "images_per_second": round(recipe.schedule.batch_size / seconds["factors"], 3),
        "forward_speed_ratio_lycoris": round(seconds["delta"] / seconds["factors"], 3),
        "forward_speed_ratio_lycoris_bypass": round(seconds["bypass"] / seconds["factors"], 3),
        "deterministic_cost": round(seconds["factors"] / seconds["loose"] - 1, 4),
        "peak_gib": round(peak, 2),
        "journal_cost": round(cost, 5),
        "card": torch.cuda.get_device_name(),
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
    if torch.cuda.is_available():
        numerics.enforce("cuda")
        figures |= bench_full_size(release, rounds, schedule)
    else:
        click.echo("no CUDA card here: images/s and peak memory at full size are not measured")
    work = ROOT / work
    work.mkdir(parents=True, exist_ok=True)
    (work / "train.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(f"→ {work / 'train.json'}")


if __name__ == "__main__":
    main()
