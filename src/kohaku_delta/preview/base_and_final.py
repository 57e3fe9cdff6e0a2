"""Invariant: base and final see the same prompts, seeds, posts and noise; only the weights differ.

With reference drawings (download.inputs.references), the distance of each picture to its prompt's drawing is measured
too. Pictures are drawn in SDXL's own form, as every program draws. The held-out loss is measured in that form and in
the one that the recipe trains in. A recipe that trains its whole collection has no held-out post: then there is no
loss, and the outputs say why.
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
    """Writes the grid and the losses; returns {"posts": n, "base": {"loss": {"sdxl": x, "training": y}}, "final": …};
    with references each also has "distance" (picture_distance.measure), and so has "flat", a picture of one colour.
    Without a held-out post: {"posts": 0, "reason": …}.
    """
    database = Database(files["database"] or inputs_manifest.path(files["inputs"], "database"))
    tar_files = trainer.tar_paths(files)
    _, texts = trainer.load_tokenizers(files)
    parameters = recipe.train.model_copy(
        update={"shuffle_caption": False, "tag_dropout": 0.0, "seed": recipe.preview.seed}
    )
    selected = parquet.read(files["selection"], ["post_id"])["post_id"].to_numpy()
    posts, reason = held_out_posts(recipe, database, tar_files, selected)
    texts_of_posts = captions.caption_posts(database, posts["post_id"].to_numpy(), recipe.caption)
    sizes = buckets.all_buckets(recipe.schedule)
    bucket_of = [
        sizes[index] for index in buckets.choose_bucket(posts["width"].to_numpy(), posts["height"].to_numpy(), sizes)
    ]

    drawings = references.read_references(recipe.preview, files["inputs"], files["references"])
    pictures, losses = {}, {"posts": posts.num_rows} | ({"reason": reason} if reason else {})
    with tqdm(total=4, desc="preview", unit="part", disable=None) as bar:
        for name, checkpoint in (("base", files["base"]), ("final", files["model"])):
            model = trainer.load_sdxl(
                recipe, checkpoint, texts, recipe.train.device, getattr(torch, recipe.train.precision), SDXL
            )
            model.gamma = float("inf")  # the plain loss: min(SNR, ∞) / SNR = 1
            step = trainer.latent_step(model)
            pictures[name] = sampler.sample_images(model, texts, recipe.preview, step, parameters.max_token_length)
            bar.update()
            source = BatchBuilder(
                posts,
                texts_of_posts,
                next(iter(tar_files.values())).parent,
                texts,
                parameters,
                recipe.caption.separator,
                step,
            )
            if posts.num_rows:
                losses[name] = {
                    "loss": held_out_loss.losses_by_form(
                        model, ConditioningForm.of(recipe.train), source, posts, bucket_of, recipe.schedule.batch_size
                    )
                }
            bar.update()
    caption = f"no held-out loss: {reason}"
    if posts.num_rows:
        caption = (
            f"held-out loss: base {losses['base']['loss']['sdxl']:.4f}, final {losses['final']['loss']['sdxl']:.4f}"
        )
    distances = picture_distance.mean_distances(pictures, drawings) if drawings else {}
    for name, measured in distances.items():
        losses.setdefault(name, {})["distance"] = measured
    if drawings:
        caption += f"; mean distance to the drawing: base {distances['base']['mean']:.1f}, final {distances['final']['mean']:.1f}, one flat colour {distances['flat']['mean']:.1f}"
        pictures["drawing"] = drawings
    with atomic_files.atomic_write(files["held_out"], "w") as file:
        json.dump(losses, file, indent=1)
        file.write("\n")
    with atomic_files.atomic_write(files["out"]) as file:
        file.write(image_grid.draw_grid(recipe.preview.prompts, pictures, distances, recipe.preview.columns, caption))
    return losses


def held_out_posts(
    recipe: Recipe, database: Database, tar_files: dict[int, Path], selected: np.ndarray
) -> tuple[pa.Table, str | None]:
    """The posts to measure on, as the filter stage keeps them; and if there is none, why."""
    every = database.post_ids()
    ids = selection.held_out(every, selected, recipe.preview.seed, recipe.preview.held_out)
    if not len(ids):
        return (
            filtering.POSTS.empty_table(),
            "every post of the database was selected" if recipe.preview.held_out else "preview.held_out is 0",
        )
    posts, _ = filtering.filter_posts(
        database, tar_files, ids, recipe.filter.model_copy(update={"image_check": "decode"}), recipe.caption
    )
    return posts, None if posts.num_rows else f"none of the {len(ids):,} held-out posts has an image and a caption"
