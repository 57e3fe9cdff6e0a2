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
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta import atomic_files, numerics, paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import Recipe
from kohaku_delta.printing import log_above_bar
from kohaku_delta.training import event_log, journal, run_inputs

if TYPE_CHECKING:  # it imports torch, which must find the numerics fixed
    from kohaku_delta.training.training_loop import TrainingLoop

LOG = "step,seconds,images_per_second,peak_mib,ranks\n"
NO_MEMORY = (
    "The machine's memory is full. Saved steps are kept. End other programs, give it more memory, or set fewer "
    "execution.workers, which changes no bits; then run the stage again."
)


def train(recipe: Recipe, files: dict[str, Path], work: Path) -> str | None:
    """Run this process's rank to the end (RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them).

    Returns the summary line on rank 0, None on the others. Raises UserError if it stopped early because of a signal;
    the state is saved then.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = recipe.train.device
    numerics.enforce(device)
    import torch.distributed as dist

    from kohaku_delta.training import gradient_reduction, rank_processes, run_folders, training_context
    from kohaku_delta.training.training_loop import TrainingLoop

    gradient_reduction.lanes_of_rank(recipe.schedule.lanes, rank, ranks)
    if device == "cuda":
        with readable_errors(work, rank):
            select_gpu(rank)
    tokenizer_files, tokenizers = run_inputs.load_tokenizers(files)
    tars = run_inputs.tar_paths(files)
    depends = run_inputs.run_dependencies(recipe, files, tokenizer_files, list(tars.values()))
    steps = int(parquet.read(files["schedule"], ["step"])["step"][-1].as_py()) + 1
    folder = run_folders.run_folder(work, depends, steps, rank)
    with nullcontext() if rank else run_folders.locked(folder), readable_errors(work, rank):
        if rank == 0:
            atomic_files.refuse_other_files(files["milestones"], paths.is_milestone_name)
            atomic_files.clear_left_overs(folder)
            if start := run_inputs.network_weights(files):
                log_above_bar(f"train: {run_inputs.describe_start(start, files['base'])}")
        context = training_context.build_context(recipe, files, tokenizers, tars, device)
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
        run_inputs.tar_paths(files)  # compare the tars again: they may have been changed during the weeks of a training
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
