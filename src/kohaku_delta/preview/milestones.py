"""How the model changed on the way: base, milestones and final model, measured as the preview measures base and final.

A milestone's model is the base with its LoKr baked into it, as the bake stage does: the last one has the bits of the
final model. It is a temporary file beside the outputs.
"""

from pathlib import Path

from tqdm import tqdm

from kohaku_delta import atomic_files, paths
from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.preview import checkpoint_measurement, measurement_files
from kohaku_delta.preview.checkpoint_measurement import HeldOutData
from kohaku_delta.preview.measurement_files import Measurement
from kohaku_delta.weights import bake, lokr_format


def measure_milestones(recipe: Recipe, files: dict[str, Path]) -> dict[int, Measurement]:
    """Measures the base (step 0), each milestone and the final model; writes curve and grid; returns all by step."""
    lokrs = read_milestones(files["milestones"], recipe.train.milestone_every, files["lokr"])
    data = checkpoint_measurement.read_held_out_data(recipe, files)
    measured = {0: checkpoint_measurement.measure_checkpoint(recipe, data, files["base"])}
    for step in tqdm(lokrs, desc="milestones", unit="model", disable=None):
        measured[step] = measure_lokr(recipe, data, files["base"], lokrs[step], files["out"])
    measurement_files.write_curve(files["out"], measured)
    measurement_files.write_grid(files["grid"], recipe.preview.prompts, measured)
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
