"""Base and final model compared: same prompts, seeds, posts and noise; only the weights differ.

Pictures are drawn in SDXL's own conditioning form, as every program draws. The held-out loss is measured in that form
and in the one that the recipe trains in. With reference drawings (download.inputs.references), the distance of each
picture to its prompt's drawing is measured too. A recipe that trains its whole collection has no held-out post; then
there is no loss, and the outputs say why.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from kohaku_delta import atomic_files
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, filtering, selection
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import Recipe
from kohaku_delta.preview import held_out_loss, image_grid, picture_distance, references, sampler
from kohaku_delta.training import buckets, trainer
from kohaku_delta.training.batch_builder import BatchBuilder
from kohaku_delta.training.sdxl_model import SDXL, ConditioningForm


def compare_base_and_final(recipe: Recipe, files: dict[str, Path]) -> dict:
    """Writes the grid and the measurements, and returns {"posts": n, "base": {"loss": {"sdxl": x, "training": y}},
    "final": …}. With references, each also has "distance" (picture_distance.mean_distances), and so has "flat",
    pictures of one colour. Without a held-out post: {"posts": 0, "reason": …}.
    """
    preview = recipe.preview
    database = Database(files["database"] or inputs_manifest.path(files["inputs"], "database"))
    tar_files = trainer.tar_paths(files)
    _, tokenizers = trainer.load_tokenizers(files)
    train = recipe.train.model_copy(update={"shuffle_caption": False, "tag_dropout": 0.0, "seed": preview.seed})
    selected = parquet.read(files["selection"], ["post_id"])["post_id"].to_numpy()
    posts, reason = held_out_posts(recipe, database, tar_files, selected)
    post_captions = captions.caption_posts(database, posts["post_id"].to_numpy(), recipe.caption)
    sizes = buckets.all_buckets(recipe.schedule)
    indices = buckets.choose_bucket(posts["width"].to_numpy(), posts["height"].to_numpy(), sizes)
    bucket_of = [sizes[index] for index in indices]
    drawings = references.read_references(preview, files["inputs"], files["references"])

    pictures, measured = {}, {"posts": posts.num_rows} | ({"reason": reason} if reason else {})
    with tqdm(total=4, desc="preview", unit="part", disable=None) as bar:
        for name, checkpoint in (("base", files["base"]), ("final", files["model"])):
            dtype = getattr(torch, recipe.train.precision)
            model = trainer.load_sdxl(recipe, checkpoint, tokenizers, recipe.train.device, dtype, SDXL)
            model.gamma = float("inf")  # the plain loss: min(SNR, ∞) / SNR = 1
            latent_step = trainer.latent_step(model)
            pictures[name] = sampler.sample_images(model, tokenizers, preview, latent_step, train.max_token_length)
            bar.update()
            if posts.num_rows:
                batches = BatchBuilder(
                    posts,
                    post_captions,
                    next(iter(tar_files.values())).parent,
                    tokenizers,
                    train,
                    recipe.caption.separator,
                    latent_step,
                )
                form = ConditioningForm.of(recipe.train)
                losses = held_out_loss.losses_by_form(
                    model, form, batches, posts, bucket_of, recipe.schedule.batch_size
                )
                measured[name] = {"loss": losses}
            bar.update()
    title = f"no held-out loss: {reason}"
    if posts.num_rows:
        base, final = (measured[name]["loss"]["sdxl"] for name in ("base", "final"))
        title = f"held-out loss: base {base:.4f}, final {final:.4f}"
    distances = picture_distance.mean_distances(pictures, drawings) if drawings else {}
    for name, values in distances.items():
        measured.setdefault(name, {})["distance"] = values
    if drawings:
        base, final, flat = (distances[name]["mean"] for name in ("base", "final", "flat"))
        title += f"; mean distance to the drawing: base {base:.1f}, final {final:.1f}, one flat colour {flat:.1f}"
        pictures["drawing"] = drawings
    with atomic_files.atomic_write(files["held_out"], "w") as file:
        json.dump(measured, file, indent=1)
        file.write("\n")
    with atomic_files.atomic_write(files["out"]) as file:
        file.write(image_grid.draw_grid(preview.prompts, pictures, distances, preview.columns, title))
    return measured


def held_out_posts(
    recipe: Recipe, database: Database, tar_files: dict[int, Path], selected: np.ndarray
) -> tuple[pa.Table, str | None]:
    """The posts to measure on, as the filter stage keeps them; and if there are none, why."""
    preview = recipe.preview
    ids = selection.held_out(database.post_ids(), selected, preview.seed, preview.held_out)
    if not len(ids):
        reason = "every post of the database was selected" if preview.held_out else "preview.held_out is 0"
        return filtering.POSTS.empty_table(), reason
    decode = recipe.filter.model_copy(update={"image_check": "decode"})
    posts, _ = filtering.filter_posts(database, tar_files, ids, decode, recipe.caption)
    return posts, None if posts.num_rows else f"none of the {len(ids):,} held-out posts has an image and a caption"
