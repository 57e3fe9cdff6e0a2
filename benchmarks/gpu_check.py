"""Does a card hold the promises at SDXL's real size? `make gpu-check`: about ten minutes, no network, no data.

Everything is drawn here: weights of SDXL's shapes, pictures, captions, noise. One step has a micro-batch in each of the
eight lanes, with the release's batch, size, precision, preset and optimizer. It is computed, then again from its saved
state, then in the layout of two ranks: losses, gradients, weights and optimizer must have the same fingerprints. Then
memory against the plan (memory_plan.py), the forms of the LoKr, the cost of determinism and of the journal
(step_timing.py), and tests/integration/test_cuda.py, which also kills a training on the card. Figures:
work/bench/gpu-check.json.

Two people with the same kind of card and the same libraries must find the same fingerprints.
"""

import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "src"))

from kohaku_delta import numerics

numerics.prepare()

import click
import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn.attention import SDPBackend

import memory_plan
import step_timing
import synthetic_checkpoints
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.provenance import environment
from kohaku_delta.training import gradient_reduction, run_inputs, schedule, tensor_fingerprints, trainer
from kohaku_delta.training.batch_builder import Batch
from kohaku_delta.training.sdxl_model import ConditioningForm
from kohaku_delta.training.training_context import TrainingContext
from kohaku_delta.training.training_loop import TrainingLoop
from kohaku_delta.units import format_size

GIB = 2**30
MOST_OVERFLOWS = 4  # steps that may overflow, each halving the loss scale, before one is compared
LIBRARIES = ("torch", "bitsandbytes", "diffusers", "transformers", "lycoris-lora", "safetensors", "numpy")
CHECKS = {
    "finite": "losses and gradient of a step are finite",
    "loaded": "the saved state, loaded, has the same bytes",
    "deterministic": "the step again: same losses and gradient of each lane",
    "resumed": "the step after saving and loading: same weights and optimizer",
    "two_ranks": "the step in the layout of two ranks: same weights and optimizer",
    "small_training": "tests/integration/test_cuda.py",
}


class RecordingLoop(TrainingLoop):
    """A training loop that keeps the fingerprint of each step's whole gradient."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.gradients: list[int] = []

    def gradient(self, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, list[float], list[int]]:
        gradient, losses, lanes = super().gradient(step, batches)
        self.gradients.append(int(tensor_fingerprints.tensor_fingerprint(gradient)))
        return gradient, losses, lanes


class TwoRanksInOne(RecordingLoop):
    """Computes the lanes of rank 0 of two, then those of rank 1, and adds as all_reduce_tree does: two ranks of NCCL
    cannot share a card.
    """

    def gradient(self, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, list[float], list[int]]:
        parts = []
        for rank in range(2):
            self.lanes = gradient_reduction.lanes_of_rank(self.recipe.schedule.lanes, rank, 2)
            parts.append(TrainingLoop.gradient(self, step, batches))
        (first, *_), (second, *_) = parts

        def gather(gathered: torch.Tensor, part: torch.Tensor) -> None:
            start = part.storage_offset()
            gathered.copy_(torch.cat([part, second[start : start + len(part)]]))

        with mock.patch("torch.distributed.all_gather_single", gather):
            gradient = gradient_reduction.all_reduce_tree(first, 2)
        self.gradients.append(int(tensor_fingerprints.tensor_fingerprint(gradient)))
        # what the other rank computed is 0, as in the vector that real ranks add
        losses, lanes = ([a or b for a, b in zip(*both, strict=True)] for both in list(zip(*parts, strict=True))[1:])
        return gradient, losses, lanes


def check_recipe(release: Recipe) -> Recipe:
    """The recipe with one micro-batch in each lane, and without a warm-up, whose first rate is 0."""
    return release.model_copy(
        update={
            "schedule": release.schedule.model_copy(update={"micro_batches": release.schedule.lanes}),
            "train": release.train.model_copy(update={"warmup_steps": 0}),
        }
    )


def drawn_schedule(recipe: Recipe, steps: int) -> pa.Table:
    """Steps with one micro-batch of square pictures in each lane."""
    lanes, count, side = recipe.schedule.lanes, recipe.schedule.batch_size, recipe.model.side
    rows = [
        dict(zip(schedule.SCHEMA.names, (step, lane, lane, side, side, posts, posts), strict=True))
        for step in range(steps)
        for lane in range(lanes)
        for posts in [list(range((step * lanes + lane) * count, (step * lanes + lane + 1) * count))]
    ]
    return pa.Table.from_pylist(rows, schema=schedule.SCHEMA)


def drawn_batch(recipe: Recipe, words: int, seed: int) -> Batch:
    """A micro-batch of noise: pictures, tokens, time steps. Seed and recipe decide every byte."""
    count, side, generator = recipe.schedule.batch_size, recipe.model.side, np.random.default_rng(seed)
    ids = generator.integers(0, words, (2, count, recipe.train.max_token_length // memory_plan.CHUNK, 77))
    ids[..., 0], ids[..., -1] = words - 2, words - 1  # begin and end
    pixels = generator.integers(0, 256, (count, 3, side, side), np.uint8)
    noise = generator.standard_normal((2, count, 4, side // 8, side // 8), np.float32)
    conditions = np.tile(np.float32([side, side, 0, 0, side, side]), (count, 1))
    drawn = (pixels, *ids, conditions, *noise, generator.integers(0, 1000, count))
    return Batch(*map(torch.from_numpy, drawn))


def fill_with_drawn_numbers(device: str) -> Callable[[nn.Module], None]:
    """Gives modules weights near those of a fresh network: one block of drawn numbers, repeated over all tensors."""
    block, place = torch.from_numpy(synthetic_checkpoints.drawn(0)).to(device), 0

    def fill(module: nn.Module) -> None:
        nonlocal place
        module.to_empty(device=device)
        for name, weight in module.named_parameters():
            flat, start = weight.data.view(-1), 0
            for piece in synthetic_checkpoints.tile_block(block, place, len(flat)):
                flat[start : start + len(piece)] = piece
                start += len(piece)
            place += len(flat)
            if "norm" in name and name.endswith("weight"):
                flat += 1
        for buffer in module.buffers():  # the text encoders' positions
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))

    return fill


def drawn_context(recipe: Recipe, configs: dict[str, dict], device: str, form: str = "factors") -> TrainingContext:
    """What a rank trains with, all of it drawn."""
    recipe = step_timing.with_lokr_form(recipe, form)
    model, adapter = memory_plan.models(recipe, configs, device, fill_with_drawn_numbers(device))
    model.set_form(ConditioningForm.of(recipe.train))
    step_timing.use_bypass_form(adapter, form)
    steps = drawn_schedule(recipe, MOST_OVERFLOWS + 2)
    header = {"base": "drawn", "parameters": run_inputs.result_parameters(recipe)}
    return TrainingContext(model, adapter.to(device), None, steps, header)  # type: ignore[arg-type]


@contextmanager
def part(figures: dict, name: str) -> Iterator[None]:
    """Says what is measured, and how long it took."""
    click.echo(f"{name} …")
    began = time.perf_counter()
    yield
    figures["seconds"][name] = round(time.perf_counter() - began, 1)
    click.echo(f"    {figures['seconds'][name]:.1f} s")


def peak_bytes(device: str) -> int | None:
    """The most that torch's allocator has handed out since this was last called; None without a card."""
    if device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def free_memory() -> None:
    """A model whose layers have a LoKr is a cycle: layer → its forward → LoKr → layer."""
    gc.collect()
    torch.cuda.empty_cache()


def bytes_in_use(device: str) -> int | None:
    return torch.cuda.memory_allocated() if device == "cuda" else None


def bytes_taken(device: str) -> int | None:
    """What is not free on the card: torch's pool, workspaces of kernels, CUDA's context, other programs."""
    if device != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def hexadecimal(fingerprint: int) -> str:
    return f"{fingerprint % 2**64:016x}"


def gib(size: int | None) -> float | None:
    return None if size is None else round(size / GIB, 2)


def run_step(loop: RecordingLoop, step: int, words: int) -> dict:
    """Computes a step with its drawn micro-batches. Returns its journal row."""
    lanes = loop.recipe.schedule.lanes
    loop.step(step, (drawn_batch(loop.recipe, words, step * lanes + lane) for lane in range(lanes)))
    return loop.journal.rows[-1]


def check_steps(recipe: Recipe, configs: dict[str, dict], device: str, folder: Path, figures: dict) -> None:
    """One step at full size, again from its saved state, and as two ranks; memory, journal, attention."""
    words, checks, micro_batches = configs["te2"]["eos_token_id"] + 1, figures["checks"], recipe.schedule.micro_batches
    with part(figures, "draw the models"):
        context = drawn_context(recipe, configs, device)
        step_timing.synchronize(device)
    loop, done = RecordingLoop(recipe, context, folder), 0
    with part(figures, f"the first step of {micro_batches} micro-batches that does not overflow, and its state saved"):
        while not checks["finite"] and done <= MOST_OVERFLOWS:
            checks["finite"] = isfinite(run_step(loop, done, words)["gradient_norm"])
            done += 1
        if not checks["finite"]:
            raise UserError(f"The gradient is not finite in {done} steps, so nothing can be compared.")
        began = time.perf_counter()
        loop.save(done)
        figures |= {"overflows": done - 1, "save_seconds": round(time.perf_counter() - began, 2)}
        saved = loop.journal.rows[-1]
    with part(figures, "the next step"):
        peak_bytes(device)
        began = time.perf_counter()
        row, gradient = run_step(loop, done, words), loop.gradients[-1]
        seconds = (time.perf_counter() - began) / micro_batches
        figures |= {"peak_gib": gib(peak_bytes(device)), "weights_gib": gib(bytes_in_use(device))}
        figures["taken_gib"] = gib(bytes_taken(device))
        cost = statistics.median(step_timing.time_journal(loop) for _ in range(3))
        figures["journal_cost"] = round(cost / seconds / figures["micro_batches_of_a_step"], 5)
        figures["fingerprints"] = {
            "gradient": hexadecimal(gradient),
            "weights": hexadecimal(row["weights"]),
            "optimizer": hexadecimal(row["optimizer"]),
        }
    del loop  # its optimizer is on the card
    with part(figures, "the same step again, from the saved state"):
        again = resumed(RecordingLoop, recipe, context, folder, done)
        checks["loaded"] = all(
            tensor_fingerprints.combine(tensor_fingerprints.fingerprints(tensors)) == saved[name]
            for name, tensors in (("weights", again.adapter.tensors()), ("optimizer", again.optimizer.tensors()))
        )
        row_again = run_step(again, done, words)
        same = all(row_again[name] == row[name] for name in ("losses", "lanes"))
        checks["deterministic"] = same and again.gradients[-1] == gradient
        checks["resumed"] = row_again == row
    del again
    with part(figures, "the same step as two ranks"):
        two = resumed(TwoRanksInOne, recipe, context, folder, done)
        checks["two_ranks"] = run_step(two, done, words) == row and two.gradients[-1] == gradient
    del two
    with part(figures, "the VAE alone, and the form of attention"):
        encode, before = drawn_batch(recipe, words, 0).to(device), bytes_in_use(device)
        peak_bytes(device)
        context.model.latents(encode.pixels, encode.latent_noise)
        peak = peak_bytes(device)
        figures["vae_gib"] = None if peak is None or before is None else gib(peak - before)
        figures["attention"] = attention_forms(recipe, configs, device)


def resumed(
    kind: type[RecordingLoop], recipe: Recipe, context: TrainingContext, folder: Path, done: int
) -> RecordingLoop:
    """A loop with a new optimizer; its weights are overwritten, then loaded from the state after `done` steps."""
    for tensor in context.adapter.tensors().values():
        tensor.fill_(-1)
    loop = kind(recipe, context, folder)
    loop.resume_from(done)
    return loop


def attention_forms(recipe: Recipe, configs: dict[str, dict], device: str) -> dict[str, str]:
    """The form of attention that torch chooses for each part of the model, at this recipe's size."""
    count, side = recipe.schedule.batch_size, recipe.model.side
    unet, chunks = configs["unet"], recipe.train.max_token_length // memory_plan.CHUNK
    half = getattr(torch, recipe.train.precision)
    heads, width = configs["te2"]["num_attention_heads"], configs["te2"]["hidden_size"]
    unet_heads, unet_width = unet["attention_head_dim"][1], unet["block_out_channels"][1]
    shapes = {
        "VAE": ((1, 1, (side // 8) ** 2, configs["vae"]["block_out_channels"][-1]), torch.float32),
        "U-Net": ((count, unet_heads, (side // 16) ** 2, unet_width // unet_heads), half),
        "text encoder 2": ((count * chunks, heads, memory_plan.CHUNK + 2, width // heads), half),
    }
    forms = {}
    for name, (shape, dtype) in shapes.items():
        like = torch.empty(shape, dtype=dtype, device=device)
        forms[name] = SDPBackend(torch._fused_sdp_choice(like, like, like)).name.lower()
    return forms


def measure_forms(recipe: Recipe, configs: dict[str, dict], device: str, rounds: int, figures: dict) -> None:
    """Forward and backward of one micro-batch by each form of the LoKr, and without deterministic algorithms. A form
    for which the card's memory is too small is left out.
    """
    batch = drawn_batch(recipe, configs["te2"]["eos_token_id"] + 1, 0)
    seconds: dict[str, float] = {}
    for form in step_timing.FORMS:
        with part(figures, f"{rounds} forward and backward, LoKr form `{form}`"):
            try:
                parts = drawn_context(recipe, configs, device, form)
                once = partial(step_timing.time_forward_backward, parts, [batch])
                works = {form: once} | ({"loose": step_timing.nondeterministic(once)} if form == "factors" else {})
                seconds |= step_timing.alternate_rounds(rounds, works)
            except torch.OutOfMemoryError:
                click.echo("    not measured: the card's memory is full")
            parts = once = works = None  # type: ignore[assignment]
            free_memory()

    def ratio(name: str, over: str) -> float | None:
        return round(seconds[name] / seconds[over], 4) if {name, over} <= seconds.keys() else None

    figures |= {
        "seconds_per_micro_batch": round(seconds["factors"], 3) if "factors" in seconds else None,
        "images_per_second": round(len(batch.pixels) / seconds["factors"], 3) if "factors" in seconds else None,
        "forward_speed_ratio_lycoris": ratio("delta", "factors"),
        "forward_speed_ratio_lycoris_bypass": ratio("bypass", "factors"),
        "deterministic_speed_ratio": ratio("factors", "loose"),
    }


def measure_layouts(recipe: Recipe, configs: dict[str, dict], device: str, rounds: int, figures: dict) -> None:
    """Forward and backward of a convolution of the U-Net's first level, in torch's usual layout and in channels_last,
    which the training does not use.
    """
    width, side = configs["unet"]["block_out_channels"][0], recipe.model.side // 8
    half = getattr(torch, recipe.train.precision)

    def convolve(layout: torch.memory_format) -> float:
        x = torch.ones((recipe.schedule.batch_size, width, side, side), dtype=half, device=device)
        x = x.to(memory_format=layout).requires_grad_()
        layer = nn.Conv2d(width, width, 3, padding=1, dtype=half, device=device).to(memory_format=layout)
        step_timing.synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            layer(x).backward(x.detach())
        step_timing.synchronize(device)
        return time.perf_counter() - began

    with part(figures, "a convolution in two layouts"):
        works = {"usual": torch.contiguous_format, "last": torch.channels_last}
        seconds = step_timing.alternate_rounds(
            rounds, {name: partial(convolve, layout) for name, layout in works.items()}
        )
        figures["channels_last_speed_ratio"] = round(seconds["last"] / seconds["usual"], 4)


def run_small_training(figures: dict) -> None:
    """tests/integration/test_cuda.py, with the miniature's data, which is in the repository."""
    with part(figures, CHECKS["small_training"]):
        pull = [sys.executable, "-m", "dvc", "pull", "--quiet", "--remote", "embedded", "data.dvc"]
        test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow"]
        subprocess.run(pull, cwd=ROOT, capture_output=True)
        done = subprocess.run(
            [*test, "tests/integration/test_cuda.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        figures["small_training"] = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
        figures["checks"]["small_training"] = done.returncode == 0
        if done.returncode:
            click.echo(done.stdout[-4000:] + done.stderr[-1000:])


def require_memory(card: str, total: int, free: int, planned: int) -> None:
    """Raises UserError if a step cannot fit."""
    if free < planned:
        raise UserError(
            f"{card} has {format_size(total)} of memory, of which {format_size(free)} are free; a step of the release "
            f"on one card takes {format_size(planned)} (planned). Nothing was computed. Use a card with 24 GB, or end "
            "the programs that use this one. On a smaller card the recipe cannot be trained either: batch size and "
            "picture size decide the bits."
        )


def new_figures(release: Recipe) -> dict:
    return {"checks": dict.fromkeys(CHECKS), "micro_batches_of_a_step": release.schedule.micro_batches, "seconds": {}}


def describe_card() -> dict:
    """Card, driver and libraries."""
    cudnn = torch.backends.cudnn.version()
    return {
        "card": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": environment.gpu_driver(),
        "versions": {name: version(name) for name in LIBRARIES}
        | {"cudnn": str(cudnn), "nccl": ".".join(map(str, torch.cuda.nccl.version()))},
        "numerics": numerics.describe("cuda"),
    }


def table(figures: dict) -> str:
    """The figures as Markdown, to be shared."""

    def show(name: str, unit: str = "") -> str:
        value = figures.get(name)
        return "not measured" if value is None else f"{value}{unit}"

    answers = {True: "yes", False: "NO", None: "not measured"}
    prints, facts = figures.get("fingerprints", {}), figures.get("numerics", {})
    rows = [
        ("card", f"{show('card')}, driver {show('driver')}"),
        ("architecture, multiprocessors", f"{facts.get('architecture')}, {facts.get('multiprocessors')}"),
        ("libraries", ", ".join(f"{name} {value}" for name, value in figures.get("versions", {}).items())),
        *((CHECKS[name], answers[ok]) for name, ok in figures["checks"].items()),
        ("fingerprints: gradient, weights, optimizer", " ".join(prints.values()) or "not measured"),
        ("peak of a step (planned)", f"{show('peak_gib', ' GiB')} ({show('planned_peak_gib', ' GiB')})"),
        ("always in use (planned)", f"{show('weights_gib', ' GiB')} ({show('planned_weights_gib', ' GiB')})"),
        ("taken on the card after it, with pool and context", show("taken_gib", " GiB")),
        ("the VAE's encoding alone", show("vae_gib", " GiB")),
        ("attention", ", ".join(f"{name}: {form}" for name, form in figures.get("attention", {}).items())),
        ("a micro-batch", f"{show('seconds_per_micro_batch', ' s')}, {show('images_per_second')} images/s"),
        ("LyCORIS's default form takes", show("forward_speed_ratio_lycoris", " times as long")),
        ("its bypass form", show("forward_speed_ratio_lycoris_bypass", " times as long")),
        ("deterministic takes", show("deterministic_speed_ratio", " times as long")),
        ("a convolution takes in channels_last", show("channels_last_speed_ratio", " times as long")),
        ("the journal, of a step", show("journal_cost")),
        ("a state is saved in", show("save_seconds", " s")),
        ("killed and resumed", show("small_training")),
    ]
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Turns of each form; their median counts.")
@click.option(
    "--work", type=click.Path(path_type=Path), default="work/bench", show_default=True, help="Where the figures go."
)
def main(rounds: int, work: Path) -> None:
    """Does this card hold the promises at SDXL's real size?"""
    if reason := numerics.cuda_error():
        click.echo(f"no CUDA card here: steps, speed and memory at full size are not measured ({reason})")
        return
    numerics.enforce("cuda")
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it comments on casts
    warnings.simplefilter("ignore", FutureWarning)
    release, work = params.load(ROOT / "params.yaml"), ROOT / work
    recipe, configs = check_recipe(release), synthetic_checkpoints.configs(1.0)
    work.mkdir(parents=True, exist_ok=True)
    figures = new_figures(release) | describe_card()
    try:
        with trainer.readable_errors(work, 0):
            with part(figures, "plan the memory of a step"):
                planned = memory_plan.peak_bytes(recipe, drawn_schedule(recipe, 1), 1)
            figures |= {"planned_peak_gib": gib(max(planned.values())), "planned_weights_gib": gib(planned["weights"])}
            free, total = torch.cuda.mem_get_info()
            require_memory(figures["card"], total, free, max(planned.values()))
            with tempfile.TemporaryDirectory(dir=work) as folder:
                check_steps(recipe, configs, "cuda", Path(folder), figures)
            free_memory()
            measure_forms(recipe, configs, "cuda", rounds, figures)
            measure_layouts(recipe, configs, "cuda", rounds, figures)
            run_small_training(figures)
    finally:
        (work / "gpu-check.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(f"\n{table(figures)}\n→ {work / 'gpu-check.json'}")
    if failed := [CHECKS[name] for name, ok in figures["checks"].items() if not ok]:
        raise UserError(
            f"This card does not hold: {'; '.join(failed)}. Do not train with it before that is understood."
        )


if __name__ == "__main__":
    main()
