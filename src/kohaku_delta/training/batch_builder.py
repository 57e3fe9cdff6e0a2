"""Invariant: a micro-batch is a function of its row in the schedule and the declared inputs: no state, no order, no
clock.

Flow: schedule row → posts (tar, offset, size) and captions → pixels, token ids, size conditions, noise, time steps.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from kohaku_delta.danbooru import image, tars
from kohaku_delta.errors import UserError
from kohaku_delta.params import Train
from kohaku_delta.training import buckets, conditioning, sample_rng

LATENT_CHANNELS = 4


@dataclass
class Batch:
    """B images. pixels (B, 3, H, W) uint8; ids (B, chunks, 77); time_ids (B, 6); latent_noise, noise (B, 4, H/f, W/f);
    time_steps (B,).
    """

    pixels: torch.Tensor
    ids1: torch.Tensor
    ids2: torch.Tensor
    time_ids: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    time_steps: torch.Tensor

    def to(self, device: str) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class BatchBuilder:
    """Posts, captions and pictures by post id. `latent_step`: pixels a latent (8 for SDXL's VAE)."""

    def __init__(
        self,
        posts: pa.Table,
        captions: pa.Table,
        folder: Path,
        tokenizers: tuple,
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
                f"Post {post} stands in the schedule and not in {file}: these files are of different runs. Run their stages again."
            )
        return row

    def caption(self, post: int) -> str:
        return self.captions["caption"][self._row(self.caption_ids, post, "captions.parquet")].as_py()

    def pixels(self, post: int, bucket: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """The fitted picture, (height, width, 3) uint8, and the (width, height) of the file."""
        place = self.posts.slice(self._row(self.post_ids, post, "posts.parquet"), 1).to_pylist()[0]
        try:
            picture = image.decode(tars.read_member(self.folder, place["tar"], place["offset"], place["size"]))
        except image.UnreadableImage as error:
            raise UserError(
                f"Post {post} in {place['tar']} cannot be decoded ({error}). Set filter.image_check to decode and run again: such posts are then dropped."
            ) from None
        size = (picture.shape[1], picture.shape[0])
        if size != (place["width"], place["height"]):
            raise UserError(
                f"Post {post} in {place['tar']} is {size[0]}×{size[1]}; posts.parquet says {place['width']}×{place['height']}. Run the filter stage again."
            )
        return buckets.resize_and_crop(picture, bucket), size

    def batch(self, posts: list[int], visits: list[int], bucket: tuple[int, int]) -> Batch:
        """The micro-batch of these posts; `visits` are the counters that key what is random."""
        p = self.parameters
        shape = (LATENT_CHANNELS, bucket[1] // self.latent_step, bucket[0] // self.latent_step)
        pictures, time_ids, texts = [], [], []
        for post, counter in zip(posts, visits):
            picture, size = self.pixels(post, bucket)
            pictures.append(torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))))
            time_ids.append(buckets.time_ids(size, bucket, p.crop_conditioning))
            texts.append(
                sample_rng.caption_for(
                    self.caption(post), self.separator, p.shuffle_caption, p.tag_dropout, p.seed, counter
                )
            )
        first, second = self.tokenizers
        return Batch(
            pixels=torch.stack(pictures),
            ids1=torch.stack(
                [conditioning.token_chunks(first, text, p.max_token_length, first.eos_token_id) for text in texts]
            ),
            ids2=torch.stack([conditioning.token_chunks(second, text, p.max_token_length, 0) for text in texts]),
            time_ids=torch.tensor(time_ids),
            latent_noise=torch.stack(
                [torch.from_numpy(sample_rng.normal_for(shape, p.seed, each, sample_rng.LATENT)) for each in visits]
            ),
            noise=torch.stack(
                [torch.from_numpy(sample_rng.noise_for(shape, p.noise_offset, p.seed, each)) for each in visits]
            ),
            time_steps=torch.tensor([sample_rng.time_step_for(p.seed, each) for each in visits]),
        )
