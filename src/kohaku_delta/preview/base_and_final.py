"""Base and final model compared: same prompts, seeds, posts and noise; only the weights differ.

With reference drawings (download.inputs.references), the distance of each picture to its prompt's drawing is measured
too.
"""

import json
from pathlib import Path

from tqdm import tqdm

from kohaku_delta import atomic_files
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.params import Recipe
from kohaku_delta.preview import checkpoint_measurement, measurement_files, picture_distance, references, samples


def compare_base_and_final(recipe: Recipe, files: dict[str, Path]) -> dict:
    """Writes the grid, its pictures and the measurements, and returns {"posts": n, "base": {"loss": {"sdxl": x,
    "training": y}}, "final": …}. With references, each also has "distance" (picture_distance.mean_distances), and so
    has "flat", pictures of one colour. Without a held-out post: {"posts": 0, "reason": …}.
    """
    preview = recipe.preview
    data = checkpoint_measurement.read_held_out_data(recipe, files)
    drawings = references.read_references(preview, files["inputs"], files["references"])
    pictures = {}
    measured: dict = {"posts": data.posts.num_rows} | ({"reason": data.reason} if data.reason else {})
    checkpoints = {"base": files["base"], "final": files["model"]}
    for name in tqdm(checkpoints, desc="preview", unit="model", disable=None):
        pictures[name], losses = checkpoint_measurement.measure_checkpoint(recipe, data, checkpoints[name])
        if losses:
            measured[name] = {"loss": losses}
    named = {name: (path.stem, hash_file(path)) for name, path in checkpoints.items()}
    samples.write_samples(files["samples"], preview, pictures, named)
    for name, values in (picture_distance.mean_distances(pictures, drawings) if drawings else {}).items():
        measured.setdefault(name, {})["distance"] = values
    with atomic_files.atomic_write(files["held_out"], "w") as file:
        json.dump(measured, file, indent=1)
        file.write("\n")
    with atomic_files.atomic_write(files["out"]) as file:
        file.write(measurement_files.draw_sheet(preview, pictures, drawings, measured))
    return measured
