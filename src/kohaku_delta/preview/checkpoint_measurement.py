"""One checkpoint measured: the preview's prompts drawn, and the loss on held-out posts.

Prompts, seeds, posts and noise are the same for every checkpoint; only the weights differ. Pictures are drawn in SDXL's
own conditioning form, as every program draws. The held-out loss is measured in that form and in the one that the recipe
trains in. A recipe that trains its whole collection has no held-out post; then there is no loss, and a reason.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from kohaku_delta.danbooru import tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, filtering, selection
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import Recipe
from kohaku_delta.preview import held_out_loss, sampler
from kohaku_delta.preview.measurement_files import Measurement
from kohaku_delta.training import buckets, run_inputs, training_context
from kohaku_delta.training.batch_builder import BatchBuilder
from kohaku_delta.training.sdxl_model import SDXL, ConditioningForm


@dataclass(frozen=True)
class HeldOutData:
    """What every checkpoint is measured on. `reason`: why there is no held-out post."""

    tokenizers: run_inputs.Tokenizers
    tars: dict[int, Path]
    posts: pa.Table
    captions: pa.Table
    bucket_of: list[tuple[int, int]]  # (width, height) of each post's bucket
    reason: str | None


def read_held_out_data(recipe: Recipe, files: dict[str, Path]) -> HeldOutData:
    """Draws the held-out posts. files: inputs and selection; database, tars and tokenizers if given by hand."""
    database = Database(files["database"] or inputs_manifest.path(files["inputs"], "database"))
    tar_files = run_inputs.tar_paths(files)
    _, tokenizers = run_inputs.load_tokenizers(files)
    selected = parquet.read(files["selection"], ["post_id"])["post_id"].to_numpy()
    posts, reason = held_out_posts(recipe, database, tar_files, selected)
    sizes = buckets.all_buckets(recipe.schedule)
    indices = buckets.choose_bucket(posts["width"].to_numpy(), posts["height"].to_numpy(), sizes)
    return HeldOutData(
        tokenizers,
        tar_files,
        posts,
        captions.caption_posts(database, posts["post_id"].to_numpy(), recipe.caption),
        [sizes[index] for index in indices],
        reason,
    )


def held_out_posts(
    recipe: Recipe, database: Database, tar_files: dict[int, Path], selected: np.ndarray
) -> tuple[pa.Table, str | None]:
    """The posts to measure on, drawn from those of the tars at hand, as the filter stage keeps them; and if there are
    none, why.
    """
    preview = recipe.preview
    candidates = tars.in_main_tars(database.post_ids(), tar_files)
    ids = selection.held_out(candidates, selected, preview.seed, preview.held_out)
    if not len(ids):
        reason = "every post of the tars was selected" if preview.held_out else "preview.held_out is 0"
        return filtering.POSTS.empty_table(), reason
    decode = recipe.filter.model_copy(update={"image_check": "decode"})
    posts, _ = filtering.filter_posts(database, tar_files, ids, decode, recipe.caption)
    return posts, None if posts.num_rows else f"none of the {len(ids):,} held-out posts has an image and a caption"


def measure_checkpoint(recipe: Recipe, data: HeldOutData, checkpoint: Path) -> Measurement:
    """Draws the prompts and measures the loss with a checkpoint, on train.device."""
    train = recipe.train.model_copy(update={"shuffle_caption": False, "tag_dropout": 0.0, "seed": recipe.preview.seed})
    dtype = getattr(torch, train.precision)
    model = training_context.load_sdxl(recipe, checkpoint, data.tokenizers, train.device, dtype, SDXL)
    model.gamma = float("inf")  # the plain loss: min(SNR, ∞) / SNR = 1
    pixels_per_latent = training_context.pixels_per_latent(model)
    pictures = sampler.sample_images(model, data.tokenizers, recipe.preview, pixels_per_latent, train.max_token_length)
    if not data.posts.num_rows:
        return Measurement(pictures, None)
    batches = BatchBuilder(
        data.posts,
        data.captions,
        next(iter(data.tars.values())).parent,
        data.tokenizers,
        train,
        recipe.caption.separator,
        pixels_per_latent,
    )
    form = ConditioningForm.of(recipe.train)
    losses = held_out_loss.losses_by_form(model, form, batches, data.posts, data.bucket_of, recipe.schedule.batch_size)
    return Measurement(pictures, losses)
