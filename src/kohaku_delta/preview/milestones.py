"""How the model changed on the way: base, milestones and final model, measured as the preview measures base and final.

A milestone's model is the base with its LoKr baked into it, as the bake stage does: the last one has the bits of the
final model. It is a temporary file beside the outputs.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from kohaku_delta import atomic_files, paths
from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.preview import checkpoint_measurement, image_grid
from kohaku_delta.preview.checkpoint_measurement import HeldOutData, Measurement
from kohaku_delta.preview.image_grid import Grid
from kohaku_delta.weights import bake, lokr_format

CURVE = "step,held_out_loss,held_out_loss_training\n"
CELL, SHEET = 256, 2400  # px: at most so wide are a picture, and a row of prompts side by side


def measure_milestones(recipe: Recipe, files: dict[str, Path]) -> dict[int, Measurement]:
    """Measures the base (step 0), each milestone and the final model; writes curve and grid; returns all by step."""
    lokrs = read_milestones(files["milestones"], recipe.train.milestone_every, files["lokr"])
    data = checkpoint_measurement.read_held_out_data(recipe, files)
    measured = {0: checkpoint_measurement.measure_checkpoint(recipe, data, files["base"])}
    for step in tqdm(lokrs, desc="milestones", unit="model", disable=None):
        measured[step] = measure_lokr(recipe, data, files["base"], lokrs[step], files["out"])
    write_curve(files["out"], measured)
    write_grid(files["grid"], recipe.preview.prompts, measured)
    return measured


def read_milestones(folder: Path, every: int, final: Path) -> dict[int, Path]:
    """LoKr files by their number of steps, the final one last. Raises UserError for one that is missing, damaged or not
    of its step.
    """
    last = steps_of(final)
    lokrs = {step: folder / paths.milestone_name(step) for step in range(every, last, every)}
    for step, path in lokrs.items():
        require_step(path, step)
    return lokrs | {last: final}


def steps_of(lokr: Path) -> int:
    """The number of steps that a LoKr file was trained for. Raises UserError for a file that no training wrote, or that
    is damaged.
    """
    return int(lokr_format.verified_metadata(lokr)[lokr_format.STEPS])


def require_step(lokr: Path, step: int) -> None:
    """Raises UserError if a milestone is damaged, or of another step than its name says."""
    if (steps := steps_of(lokr)) != step:
        raise UserError(f"{lokr} was written after {steps} steps, and its name says {step}. Move it away.")


def measure_lokr(recipe: Recipe, data: HeldOutData, base: Path, lokr: Path, beside: Path) -> Measurement:
    """Measures base + LoKr, baked into a temporary file beside the path `beside`."""
    with atomic_files.scratch_dir(beside) as folder:
        checkpoint = folder / "model.safetensors"
        bake.bake(base, lokr, recipe.bake, recipe.model.side, checkpoint)
        return checkpoint_measurement.measure_checkpoint(recipe, data, checkpoint)


def write_curve(path: Path, measured: Mapping[int, Measurement]) -> None:
    """A row per step, ascending: held-out loss in SDXL's form and in the training's; empty without a held-out post."""
    with atomic_files.atomic_write(path, "w") as file:
        file.write(CURVE)
        for step, (_, losses) in sorted(measured.items()):
            values = (repr(losses["sdxl"]), repr(losses["training"])) if losses else ("", "")
            file.write(f"{step},{','.join(values)}\n")


def write_grid(path: Path, prompts: list[str], measured: Mapping[int, Measurement]) -> None:
    """Per prompt a row of pictures, from the base to the last step."""
    pictures, labels = {}, []
    for step, (drawn, losses) in sorted(measured.items()):
        name = f"step {step:,}" if step else "base"
        pictures[name] = [_shrink(picture) for picture in drawn]
        labels += [f"{name}: {losses['sdxl']:.4f}"] if losses else []
    shown = next(iter(pictures.values()))[0]
    columns = _columns(len(prompts), len(pictures), shown.shape[1])
    title = f"held-out loss: {', '.join([labels[0], labels[-1]])}" if labels else "no held-out loss"
    with atomic_files.atomic_write(path) as file:
        file.write(image_grid.draw_grid(prompts, pictures, {}, columns, title))


def grid_of(prompts: list[str], models: int, size: tuple[int, int]) -> Grid:
    """Where write_grid puts pictures that were drawn in `size` (width, height)."""
    factor = -(-size[0] // CELL)
    width, height = -(-size[0] // factor), -(-size[1] // factor)
    return Grid.of(prompts, models, (width, height), _columns(len(prompts), models, width))


def _columns(prompts: int, models: int, width: int) -> int:
    return max(1, min(prompts, SHEET // (models * max(CELL, width))))


def _shrink(picture: np.ndarray) -> np.ndarray:
    """Means of squares of pixels, at most CELL wide."""
    return np.asarray(Image.fromarray(picture).reduce(-(-picture.shape[1] // CELL)))
