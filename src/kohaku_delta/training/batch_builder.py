"""Micro-batches. Each is a function of its row in the schedule and the declared inputs: no state, order or clock.

schedule row → posts (tar, offset, size) and captions → pixels, token ids, size conditions, noise, time steps. torch's
DataLoader does this in worker processes ahead of the device; their number changes no byte of a batch.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from kohaku_delta.danbooru import image, tars
from kohaku_delta.errors import UserError
from kohaku_delta.params import Train
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import buckets, conditioning, sample_rng

LATENT_CHANNELS = 4
AHEAD = 4  # micro-batches that each worker process keeps ready
GO_ON = "Change nothing in params.yaml: with the right file the training goes on from its last saved state."
OTHER_BYTES = (
    "The tar no longer has the bytes that the filter stage checked: its disk, or a copy of it, is damaged. "
    f"{tars.HASH_AGAIN} {GO_ON}\n"
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
    holds the tars. `latent_step`: pixels per latent (8 for SDXL's VAE).
    """

    def __init__(
        self,
        posts: pa.Table,
        captions: pa.Table,
        folder: Path,
        tokenizers: tuple[ClipTokenizer, ClipTokenizer],
        parameters: Train,
        separator: str,
        latent_step: int,
    ):
        self.posts, self.captions = posts.combine_chunks(), captions.combine_chunks()
        self.post_ids, self.caption_ids = posts["post_id"].to_numpy(), captions["post_id"].to_numpy()
        self.folder, self.tokenizers = folder, tokenizers
        self.parameters, self.separator, self.latent_step = parameters, separator, latent_step

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
            decoded = image.decode(data, row["width"] * row["height"])
        except image.UnreadableImage as error:
            raise UserError(f"{where} cannot be decoded ({error}). {OTHER_BYTES}") from None
        size = (decoded.shape[1], decoded.shape[0])
        if size != (row["width"], row["height"]):
            expected = f"{row['width']}×{row['height']}"
            raise UserError(f"{where} is {size[0]}×{size[1]}; posts.parquet says {expected}. {OTHER_BYTES}")
        return buckets.resize_and_crop(decoded, bucket), size

    def batch(self, posts: list[int], visits: list[int], bucket: tuple[int, int]) -> Batch:
        """The micro-batch of these posts. `visits`: the counters that key everything random about each of them."""
        p = self.parameters
        shape = (LATENT_CHANNELS, bucket[1] // self.latent_step, bucket[0] // self.latent_step)
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
    """The schedule's micro-batches. A UserError is returned: a worker would wrap a raised one in a traceback."""

    def __init__(self, builder: BatchBuilder, schedule: pa.Table):
        self.builder, self.schedule = builder, schedule

    def __getitem__(self, row: int) -> Batch | UserError:
        micro_batch = self.schedule.slice(row, 1).to_pylist()[0]
        bucket = (micro_batch["width"], micro_batch["height"])
        try:
            return self.builder.batch(micro_batch["posts"], micro_batch["visits"], bucket)
        except UserError as error:
            return error


def load_batches(builder: BatchBuilder, schedule: pa.Table, rows: list[int], workers: int) -> Iterator[Batch]:
    """Yield the micro-batch of each of these rows of the schedule, in this order.

    `workers`: processes that load ahead; 0 loads in this process. The loader gets its own generator, so that torch's
    global one stays untouched.
    """
    loader = DataLoader(
        ScheduleDataset(builder, schedule),
        batch_size=None,
        sampler=rows,
        num_workers=workers,
        generator=torch.Generator(),
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _ignore_signals(worker: int) -> None:
    """Workers end with their trainer: a signal that asks the trainer to stop must not end them during a step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
