"""Runs one rank of the training, from the declared files to the LoKr file. Rank 0 alone writes, after the last step.

Fix the numerics → build model and adapter from the base → load the newest state → steps → LoKr, journal, curves.
Time, throughput and memory per step go to `log.csv` in the run's work folder, and to TensorBoard if
`execution.tensorboard` says so; nothing depends on them.
"""

import errno
import os
import resource
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta import atomic_files, numerics, paths
from kohaku_delta.danbooru import tars as tar_files
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet, safetensors_io
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import NETWORK_WEIGHTS, Recipe
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import event_log, journal
from kohaku_delta.weights import lokr_format

if TYPE_CHECKING:  # these import torch, which must find the numerics fixed
    import torch

    from kohaku_delta.training.sdxl_model import ConditioningForm, Sdxl
    from kohaku_delta.training.training_loop import TrainingContext, TrainingLoop

LOG = "step,seconds,images_per_second,peak_mib,ranks\n"
NO_MEMORY = (
    "The machine's memory is full. Saved steps are kept. End other programs, give it more memory, or set fewer "
    "execution.workers, which changes no bits; then run the stage again."
)
Tokenizers = tuple[ClipTokenizer, ClipTokenizer]


def result_parameters(recipe: Recipe) -> dict:
    """The parameters that decide the weights and the journal: {section.key: value}, with values as YAML has them."""
    sections = {
        "schedule": recipe.schedule.model_dump(),
        "lokr": recipe.lokr.model_dump(),
        "model": recipe.model.model_dump(),
        "train": recipe.train.model_dump(exclude={"milestone_every"}),
        "caption": {"separator": recipe.caption.separator},
    }
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def run_dependencies(recipe: Recipe, files: dict[str, Path], texts: list[Path], tars: list[Path]) -> dict[str, str]:
    """Everything that decides the outputs, by name: files, code, parameters, numerics, libraries.

    Of tars given by hand (--tars), their names and sizes. `texts`: the tokenizers' files.
    """
    from kohaku_delta.training import checkpointing

    start = network_weights(files)
    return {
        **{name: hash_file(files[name]) for name in ("base", "posts", "captions", "schedule")},
        **checkpointing.loaded_code_digests(recipe.requirements),
        **{name: str(value) for name, value in result_parameters(recipe).items()},
        "train.milestone_every": str(recipe.train.milestone_every),
        "tokenizers": str([hash_file(path) for path in texts]),
        "tars": str(
            [(path.name, path.stat().st_size) for path in tars]
            if files["tars"]
            else inputs_manifest.sha256s(files["inputs"], "tars")
        ),
        **{f"numerics {name}": value for name, value in numerics.describe(recipe.train.device).items()},
        **({NETWORK_WEIGHTS: hash_file(start)} if start else {}),
    }


def load_tokenizers(files: dict[str, Path]) -> tuple[list[Path], Tokenizers]:
    """The four files of both tokenizers, and the tokenizers."""
    first, second = (
        inputs_manifest.tokenizer(files["inputs"], name, files[name]) for name in ("tokenizer", "tokenizer_2")
    )
    return [*first, *second], (ClipTokenizer(*first), ClipTokenizer(*second))


def tar_paths(files: dict[str, Path]) -> dict[int, Path]:
    """The tars by number, from the folder given by hand (--tars) or from the verified inputs."""
    if files["tars"]:
        return tar_files.tars_in(files["tars"])
    return tar_files.tars_by_number(inputs_manifest.paths(files["inputs"], "tars"))


def network_weights(files: dict[str, Path]) -> Path | None:
    """The LoKr file that the training begins with, given by hand or of the verified inputs; None: it begins anew."""
    by_hand = files.get("network_weights")
    if by_hand or not files["inputs"].is_file():
        return by_hand
    return inputs_manifest.optional_path(files["inputs"], NETWORK_WEIGHTS)


def describe_start(start: Path, base: Path) -> str:
    """What is said of a LoKr that the training begins with."""
    with safetensors_io.open_file(start) as file:
        known = lokr_format.base_digest(file)
    unknown = f" It does not say on which base it was trained: it is taken for that of {base}."
    return f"the LoKr begins with {start}, the optimizer and the learning rates anew.{'' if known else unknown}"


def load_sdxl(
    recipe: Recipe,
    checkpoint: Path,
    tokenizers: Tokenizers,
    device: str,
    precision: "torch.dtype",
    form: "ConditioningForm | None" = None,
) -> "Sdxl":
    """The model of a checkpoint on a device. `form`: how conditions reach the U-Net; None: as the recipe trains.

    Raises UserError if a tokenizer has more tokens than its text encoder has embeddings.
    """
    from kohaku_delta.sdxl import model_loading
    from kohaku_delta.training.sdxl_model import ConditioningForm, Sdxl

    models: dict[str, Any] = model_loading.load(checkpoint, recipe.model, dtype=precision)
    for name, tokenizer in zip(("te1", "te2"), tokenizers, strict=True):
        embeddings = models[name].config.vocab_size
        if len(tokenizer) > embeddings:
            raise UserError(
                f"{checkpoint}: text encoder {name[-1]} has {embeddings} token embeddings and its tokenizer "
                f"{len(tokenizer)} tokens. They are of different models."
            )
    models["vae"].float()
    return Sdxl(
        {name: model.to(device) for name, model in models.items()},
        tokenizers[1].eos_token_id,
        recipe.model.vae_scaling_factor,
        recipe.train.min_snr_gamma,
        device,
        precision,
        form or ConditioningForm.of(recipe.train),
    )


def latent_step(model: "Sdxl") -> int:
    """Pixels per latent: 8 for SDXL's VAE."""
    return 2 ** (len(model.models["vae"].config.block_out_channels) - 1)


def build_context(
    recipe: Recipe, files: dict[str, Path], tokenizers: Tokenizers, tars: dict[int, Path], device: str
) -> "TrainingContext":
    """Model, adapter, batch builder, schedule and the journal's header, from declared files, on a device.

    Raises UserError if there are no tars, and for a LoKr to begin with that is not of this recipe and this base.
    """
    import torch

    from kohaku_delta.training.batch_builder import BatchBuilder
    from kohaku_delta.training.lokr import LokrAdapter
    from kohaku_delta.training.training_loop import TrainingContext

    if not tars:
        raise UserError(f"{files['tars']} holds no tar (data-0000.tar …). Name the folder of the tars with --tars.")
    with safetensors_io.open_file(files["base"]) as base:
        base_digest = base.digest()
    header = {"base": base_digest, "parameters": result_parameters(recipe)}
    model = load_sdxl(recipe, files["base"], tokenizers, device, getattr(torch, recipe.train.precision))
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    adapter = LokrAdapter(model.models, recipe.lokr, getattr(torch, recipe.train.weights)).to(device)
    if start := network_weights(files):
        with safetensors_io.open_file(start) as lokr:
            lokr_format.require_base(lokr, base_digest, files["base"])
            adapter.load(lokr, recipe.lokr.alpha)
        header[NETWORK_WEIGHTS] = hash_file(start)
    builder = BatchBuilder(
        parquet.read(files["posts"], ["post_id", "tar", "offset", "size", "width", "height"]),
        parquet.read(files["captions"], ["post_id", "caption"]),
        next(iter(tars.values())).parent,
        tokenizers,
        recipe.train,
        recipe.caption.separator,
        latent_step(model),
    )
    return TrainingContext(model, adapter, builder, parquet.read(files["schedule"]), header)


def train(recipe: Recipe, files: dict[str, Path], work: Path) -> str | None:
    """Run this process's rank to the end (RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them).

    Returns the summary line on rank 0, None on the others. Raises UserError if it stopped early because of a signal;
    the state is saved then.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = recipe.train.device
    numerics.enforce(device)
    import torch.distributed as dist

    from kohaku_delta.training import checkpointing, gradient_reduction, rank_processes, run_folders
    from kohaku_delta.training.training_loop import TrainingLoop

    gradient_reduction.lanes_of_rank(recipe.schedule.lanes, rank, ranks)
    if device == "cuda":
        with readable_errors(work, rank):
            select_gpu(rank)
    tokenizer_files, tokenizers = load_tokenizers(files)
    tars = tar_paths(files)
    depends = run_dependencies(recipe, files, tokenizer_files, list(tars.values()))
    steps = int(parquet.read(files["schedule"], ["step"])["step"][-1].as_py()) + 1
    folder = run_folders.run_folder(work, depends, steps, rank)
    with nullcontext() if rank else checkpointing.locked(folder), readable_errors(work, rank):
        if rank == 0:
            atomic_files.refuse_other_files(files["milestones"], paths.is_milestone_name)
            atomic_files.clear_left_overs(folder)
            if start := network_weights(files):
                run_folders.say(describe_start(start, files["base"]))
        context = build_context(recipe, files, tokenizers, tars, device)
        if ranks > 1:
            connect_ranks(depends, rank, ranks, device)
        loop = TrainingLoop(recipe, context, folder, rank, ranks)
        done = run_steps(loop)
        if ranks > 1:
            dist.destroy_process_group()
        if loop.stopping and done < loop.steps:
            if rank:
                raise SystemExit(rank_processes.STOPPED)
            raise UserError(
                f"Stopped after step {done} of {loop.steps}, and saved. Run the stage again to go on from there."
            )
        if rank:
            return None
        tar_paths(files)  # compare the tars again: they may have been changed during the weeks of a training
        return write_outputs(loop, files)


@contextmanager
def readable_errors(work: Path, rank: int) -> Iterator[None]:
    """Turns errors of torch and of Python, for example that memory has ended, into sentences.

    The traceback of one that nobody expected is written to the work folder.
    """
    from kohaku_delta.training import gradient_reduction

    try:
        yield
    except (UserError, MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            raise UserError(NO_MEMORY) from None
        raise
    except Exception as error:
        if gradient_reduction.gpu_is_full(error):
            raise UserError(
                f"The GPU's memory is full ({str(error).splitlines()[0].split('. ')[0]}). Saved steps are kept. End "
                "other programs that use the card, or go on with one that has more memory. A smaller "
                "schedule.batch_size fits too, but is another training with other bits."
            ) from None
        if "can't allocate memory" in str(error) or "Insufficient memory" in str(error):  # torch; OpenCV
            raise UserError(NO_MEMORY) from None
        path = work / f"traceback-rank{rank}.txt"
        with suppress(OSError):
            work.mkdir(parents=True, exist_ok=True)  # only rank 0 makes it
            path.write_text(traceback.format_exc(), encoding="utf-8")
        raise UserError(
            f"The trainer failed ({''.join(traceback.format_exception_only(error)).splitlines()[0]}). "
            f"Saved steps are kept; the traceback is in {path}."
        ) from None


def select_gpu(rank: int) -> None:
    """Make LOCAL_RANK's GPU the current one. Raises UserError if this machine has fewer GPUs."""
    import torch

    gpu = int(os.environ.get("LOCAL_RANK", 0))
    if gpu >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs; rank {rank} needs one more. "
            "Start fewer ranks (--ranks; torchrun's --nproc-per-node)."
        )
    torch.cuda.set_device(gpu)


def connect_ranks(depends: dict[str, str], rank: int, ranks: int, device: str) -> None:
    """Connect to the other ranks and compare the inputs. Raises UserError if a rank is missing or has other inputs."""
    import torch.distributed as dist

    from kohaku_delta.training import distributed_state

    # The end of a lost rank, or a collective of ten minutes, is raised here, where the state can still be saved;
    # without this NCCL's watchdog aborts the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=10))
    except RuntimeError as error:
        raise UserError(
            f"Rank {rank} did not find the others ({str(error).splitlines()[0]}). "
            "Look at their output, on every machine."
        ) from None
    distributed_state.require_same_run(depends, ranks, device)


def run_steps(loop: "TrainingLoop") -> int:
    """Run the loop to its end, or until a signal. Returns the number of steps done. Rank 0 shows and logs progress."""
    images = np.add.reduceat(pc.list_value_length(loop.schedule["visits"]).to_numpy(), loop.starts[:-1])
    done = 0
    events = event_log.EventLog(loop.folder / "tensorboard") if loop.recipe.execution.tensorboard else None
    with (
        tqdm(total=loop.steps, desc="train", unit="step", disable=True if loop.rank else None) as bar,
        closing(loop.run()) as steps,
    ):
        for done, loss, seconds in steps:
            if not bar.n:  # the steps done before this run say nothing about the time left
                bar.initial = bar.n = bar.last_print_n = done - 1
            bar.update(done - bar.n)
            if loop.rank == 0:
                speed = images[done - 1] / seconds
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.2f}")
                peak = peak_memory_mib(loop.model.device)
                append_log(loop.folder / "log.csv", f"{done - 1},{seconds:.3f},{speed:.3f},{peak},{loop.ranks}\n")
                if events:
                    events.write(loop.journal.rows, speed, peak)
    return done


def write_outputs(loop: "TrainingLoop", files: dict[str, Path]) -> str:
    """Write milestones, LoKr, journal (sealed with the LoKr's digest) and curves. Returns the stage's summary line."""
    with atomic_files.atomic_dir(files["milestones"], paths.is_milestone_name) as folder:
        loop.copy_milestones(folder)
    lokr = loop.write_lokr(files["out"], loop.adapter.tensors(), loop.steps)
    loop.journal.lokr = lokr.digest
    loop.journal.write(files["journal"])
    rows = loop.journal.rows
    with atomic_files.atomic_write(files["curves"], "w") as file:
        file.writelines(journal.curve_lines(rows))
    return (
        f"{len(rows):,} steps, {len(loop.adapter.entries):,} LoKr entries, sha256 {lokr.sha256[:16]}… → "
        f"{files['out']}, {files['journal']}"
    )


def append_log(path: Path, line: str) -> None:
    """Append a line to log.csv; a new file begins with the names of its columns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line if file.tell() else LOG + line)


def peak_memory_mib(device: str) -> int:
    """Peak memory so far, MiB: of the GPU, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
