"""Micro-batches. Each is a function of its row in the schedule and the declared inputs: no state, order or clock.

schedule row → posts (tar, offset, size) and captions → pixels, token ids, size conditions, noise, time steps. torch's
DataLoader does this in worker processes ahead of the device; their number changes no byte of a batch.
"""

import atexit
import os
import signal
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kohaku_delta.danbooru import image, tars
from kohaku_delta.errors import UserError
from kohaku_delta.params import Train
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import buckets, conditioning, rank_processes, sample_rng

LATENT_CHANNELS = 4
AHEAD = 4  # micro-batches that each worker process keeps ready
LONGEST_WAIT = 600  # seconds for a micro-batch: a network file system may pause for long
LONGEST_END = 1  # second that a dying worker may need to end
FEWER_WORKERS = "set fewer execution.workers, which changes no bits, and run this again. Saved steps are kept."
GO_ON = "Change nothing in params.yaml: with the right file the training goes on from its last saved state."
OTHER_BYTES = (
    "The tar no longer has the bytes that the filter stage checked: its disk, or a copy of it, is damaged. "
    f"{tars.HASH_AGAIN} {GO_ON}"
)
DAMAGED_FROM_THE_BEGINNING = (
    "If every hash agrees and filter.image_check is `header`, the image was damaged from the beginning, because "
    "`header` did not decode it. `decode` drops such posts, but that changes the schedule and begins another training. "
    "If this one is far on, its milestones' LoKr files are usable models: `python stages/bake.py --lokr FILE`."
)


@dataclass
class Batch:
    """One micro-batch of B images; f is the number of pixels per latent (8 for SDXL)."""

    pixels: torch.Tensor  # (B, 3, H, W) uint8
    ids1: torch.Tensor  # (B, chunks, 77) int64, for text encoder 1
    ids2: torch.Tensor  # (B, chunks, 77) int64, for text encoder 2
    time_ids: torch.Tensor  # (B, 6) float32
    latent_noise: torch.Tensor  # (B, 4, H/f, W/f) float32, for the sample of the VAE's posterior
    noise: torch.Tensor  # (B, 4, H/f, W/f) float32, ε with its offset
    time_steps: torch.Tensor  # (B,) int64, 0 … 999

    def to(self, device: str) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class BatchBuilder:
    """Builds micro-batches from posts, captions and tars.

    posts: post_id, tar, offset, size, width, height; captions: post_id, caption; both ascending by post_id. `folder`
    holds the tars; the metadata of posts says how images are decoded. `pixels_per_latent`: 8 for SDXL's VAE.
    """

    def __init__(
        self,
        posts: pa.Table,
        captions: pa.Table,
        folder: Path,
        tokenizers: tuple[ClipTokenizer, ClipTokenizer],
        parameters: Train,
        separator: str,
        pixels_per_latent: int,
    ):
        self.posts, self.captions = posts.combine_chunks(), captions.combine_chunks()
        self.post_ids, self.caption_ids = posts["post_id"].to_numpy(), captions["post_id"].to_numpy()
        self.folder, self.tokenizers = folder, tokenizers
        self.parameters, self.separator, self.pixels_per_latent = parameters, separator, pixels_per_latent
        self.decoding = image.Decoding.of_posts(posts.schema.metadata)

    @staticmethod
    def _row(ids: np.ndarray, post: int, file: str) -> int:
        row = int(np.searchsorted(ids, post))
        if row == len(ids) or ids[row] != post:
            raise UserError(
                f"Post {post} is in the schedule but not in {file}: these files are of different runs. "
                "Run their stages again."
            )
        return row

    def caption(self, post: int) -> str:
        return self.captions["caption"][self._row(self.caption_ids, post, "captions.parquet")].as_py()

    def pixels(self, post: int, bucket: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """The image resized and cropped to the bucket, (height, width, 3) uint8, and its original (width, height)."""
        row = self.posts.slice(self._row(self.post_ids, post, "posts.parquet"), 1).to_pylist()[0]
        where = f"Post {post} ({row['tar']}, {row['size']:,} bytes from byte {row['offset']:,})"
        try:
            data = tars.read_member(self.folder, row["tar"], row["offset"], row["size"])
        except UserError as error:
            raise UserError(f"{where}: {error.message} {GO_ON}") from None
        try:
            # posts.parquet has the size after the re-encoding, which may have made the image smaller
            most = image.MAX_PIXELS if self.decoding.reencode_webp else row["width"] * row["height"]
            decoded = image.decode(data, most, self.decoding)
        except image.UnreadableImage as error:
            raise UserError(f"{where} cannot be decoded ({error}). {OTHER_BYTES}", DAMAGED_FROM_THE_BEGINNING) from None
        size = (decoded.shape[1], decoded.shape[0])
        if size != (row["width"], row["height"]):
            expected = f"{row['width']}×{row['height']}"
            raise UserError(
                f"{where} is {size[0]}×{size[1]}; posts.parquet says {expected}. {OTHER_BYTES}",
                DAMAGED_FROM_THE_BEGINNING,
            )
        return buckets.resize_and_crop(decoded, bucket), size

    def batch(self, posts: list[int], visits: list[int], bucket: tuple[int, int]) -> Batch:
        """The micro-batch of these posts. `visits`: the counters that key everything random about each of them."""
        p = self.parameters
        shape = (LATENT_CHANNELS, bucket[1] // self.pixels_per_latent, bucket[0] // self.pixels_per_latent)
        images, time_ids, texts = [], [], []
        for post, visit in zip(posts, visits, strict=True):
            pixels, size = self.pixels(post, bucket)
            images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
            time_ids.append(buckets.time_ids(size, bucket, p.crop_conditioning))
            caption = self.caption(post)
            texts.append(
                sample_rng.caption_for(caption, self.separator, p.shuffle_caption, p.tag_dropout, p.seed, visit)
            )
        ids1, ids2 = conditioning.token_ids(self.tokenizers, texts, p.max_token_length)
        latent_noise = [sample_rng.normal_for(shape, p.seed, visit, sample_rng.LATENT) for visit in visits]
        noise = [sample_rng.noise_for(shape, p.noise_offset, p.seed, visit) for visit in visits]
        return Batch(
            pixels=torch.stack(images),
            ids1=ids1,
            ids2=ids2,
            time_ids=torch.tensor(time_ids),
            latent_noise=torch.from_numpy(np.stack(latent_noise)),
            noise=torch.from_numpy(np.stack(noise)),
            time_steps=torch.tensor([sample_rng.time_step_for(p.seed, visit) for visit in visits]),
        )


class ScheduleDataset(Dataset):
    """The schedule's micro-batches. Errors are returned: a worker would wrap a raised one in a traceback."""

    def __init__(self, builder: BatchBuilder, schedule: pa.Table):
        self.builder, self.schedule = builder, schedule

    def __getitem__(self, row: int) -> Batch | Exception:
        micro_batch = self.schedule.slice(row, 1).to_pylist()[0]
        bucket = (micro_batch["width"], micro_batch["height"])
        try:
            batch = self.builder.batch(micro_batch["posts"], micro_batch["visits"], bucket)
            return batch if get_worker_info() is None else _share(batch)
        except UserError as error:
            return error
        except Exception as error:
            error.add_note(traceback.format_exc())  # a traceback itself cannot be sent to another process
            return error


def _share(batch: Batch) -> Batch:
    """Move a batch to shared memory here: the queue's own thread would only drop one that finds no room."""
    try:
        for tensor in vars(batch).values():
            tensor.share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"A loader worker found no shared memory for a batch ({str(error).splitlines()[0]}). "
            f"Make /dev/shm larger (a container's: --shm-size), or {FEWER_WORKERS}"
        ) from None
    return batch


def load_batches(
    builder: BatchBuilder, schedule: pa.Table, rows: list[int], workers: int
) -> Generator[Batch, None, None]:
    """Yield the micro-batch of each of these rows of the schedule, in this order.

    `workers`: processes that load ahead; 0 loads in this process. The loader gets its own generator, so that torch's
    global one stays untouched. Close the iterator to end the workers. Raises UserError if a worker was killed, or gives
    nothing for LONGEST_WAIT seconds.
    """
    loader = DataLoader(
        ScheduleDataset(builder, schedule),
        batch_size=None,
        sampler=rows,
        num_workers=workers,
        generator=torch.Generator(),
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=partial(_prepare_worker, os.getpid()),
        multiprocessing_context="fork" if workers else None,
        timeout=LONGEST_WAIT if workers else 0,
    )
    before = set(active_children())
    batches = iter(loader)
    started = set(active_children()) - before
    waiting = False

    def child_died(*_) -> None:
        if waiting:
            _error_if_any_worker_fails()

    atexit.register(_kill, started)  # before multiprocessing waits for them, if the caller fails and closes nothing
    if started:
        # torch's handler raises wherever this process is when a worker dies: in a step, or while it saves a state
        signal.signal(signal.SIGCHLD, child_died)
    try:
        for _ in rows:
            try:
                waiting = True
                _error_if_any_worker_fails()
                batch = next(batches)
            except (RuntimeError, EOFError, ConnectionError) as error:
                raise UserError(
                    f"The loader's workers failed ({_failure(started, error)}). The usual reason is that "
                    f"the machine ran out of memory, or /dev/shm of room. Give it more, or {FEWER_WORKERS}"
                ) from None
            finally:
                waiting = False
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        _kill(started)


def _failure(workers: set[BaseProcess], error: Exception) -> str:
    """How a worker ended; what `error` says if none has. A worker's connection closes shortly before it has ended."""
    last_look = time.monotonic() + LONGEST_END
    while not (ended := {worker.pid: worker.exitcode for worker in workers if worker.exitcode}):
        if time.monotonic() > last_look:
            return (str(error) or type(error).__name__).splitlines()[0].strip(" .")
        time.sleep(0.01)
    pid, code = next(iter(ended.items()))
    return f"worker {pid} " + (
        f"was killed by signal: {signal.strsignal(-code)}" if code < 0 else f"ended with exit code {code}"
    )


def _kill(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _prepare_worker(trainer: int, worker: int) -> None:
    """A worker ends with its trainer: a signal that asks the trainer to stop must not end it during a step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    rank_processes.die_with_parent(signal.SIGKILL, trainer)
