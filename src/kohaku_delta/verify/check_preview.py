"""The checks chain/samples, preview and progress: the pictures of build/samples are those of preview.png, and name the
checkpoints of this build; preview.png, held-out.json, milestones.csv and milestones.png agree, number by number and
pixel by pixel. What the checkpoints draw and lose is computed again by --stages only.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.preview import measurement_files, samples
from kohaku_delta.preview.image_grid import Grid
from kohaku_delta.preview.measurement_files import Measurement
from kohaku_delta.printing import format_some
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.regular_files import read_regular
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify import check_outputs
from kohaku_delta.verify.check_chain import require_journal, require_output
from kohaku_delta.verify.check_outputs import MAX_TEXT
from kohaku_delta.verify.findings import Check, Skip, check

MODELS = {"base": paths.BASE, "final": paths.FINAL}  # in the order of the grid; the reference drawings follow
MAX_MODELS = 100  # in milestones.png


@check("chain/samples")
def check_samples(rebuild: Artifact) -> Check:
    """Each sample has the pixels of its place in preview.png, and the settings and checkpoint hash of this build."""
    folder, preview = rebuild.folder / paths.SAMPLES, rebuild.recipe.preview
    grid_file = require_output(rebuild, "preview.png")
    if not folder.is_dir():
        raise Skip(f"{paths.SAMPLES} does not exist")
    pictures = len(MODELS) + ("references" in rebuild.recipe.download.inputs)
    grid = Grid.of(preview.prompts, pictures, (preview.width, preview.height), preview.columns)
    sheet, _ = _read_picture(grid_file, grid.size)
    expected = {
        samples.sample_name(model, index): (number, model, index)
        for number, model in enumerate(MODELS)
        for index in range(len(preview.prompts))
    }
    found = {file.name for file in folder.iterdir()}
    for name in sorted(found ^ expected.keys()):
        yield f"{paths.SAMPLES}/{name} {'is not a picture of the preview' if name in found else 'does not exist'}"
    hashes = {model: rebuild.sha256(out) for model, out in MODELS.items()}
    for name in sorted(found & expected.keys()):
        number, model, index = expected[name]
        picture, text = _read_picture(folder / name, (preview.width, preview.height))
        if not np.array_equal(picture, _cut(sheet, grid, index, number)):
            yield f"{paths.SAMPLES}/{name} is not the picture in preview.png"
        sha256 = hashes[model]
        settings = samples.parameters_text(preview, index, Path(MODELS[model]).stem, sha256 or "")
        if text != settings and (sha256 or _without_hash(text) != _without_hash(settings)):
            yield f"{paths.SAMPLES}/{name} names other settings, or another checkpoint, than this build has"
    unknown = [MODELS[model] for model, sha256 in hashes.items() if sha256 is None]
    note = f"; the hash of {', '.join(unknown)} is not known here" if unknown else ""
    return f"{len(expected)} pictures, each as in preview.png and with the settings of params.yaml{note}"


@check("chain/preview", paths.PREVIEW)
def check_sheet(rebuild: Artifact, own: Path | None) -> Check:
    """preview.png is the sheet of build/samples, the reference drawings and held-out.json, whose distances are those of
    the pictures.
    """
    from kohaku_delta.preview import picture_distance  # imports OpenCV

    preview = rebuild.recipe.preview
    grid_file = require_output(rebuild, "preview.png")
    measured = _read_measurements(require_output(rebuild, "held-out.json"))
    pictures = _read_samples(rebuild)
    has_drawings = "references" in rebuild.recipe.download.inputs
    grid = Grid.of(preview.prompts, len(MODELS) + has_drawings, (preview.width, preview.height), preview.columns)
    note, drawings = "", None
    if has_drawings:
        try:
            files = check_outputs.find_inputs(rebuild, own, "references")
            drawings = [_read_picture(path, (preview.width, preview.height))[0] for path in files]
        except Skip as reason:
            note, sheet = f"; the drawings as preview.png shows them: {reason}", _read_picture(grid_file, grid.size)[0]
            drawings = [_cut(sheet, grid, index, len(MODELS)) for index in range(len(preview.prompts))]
        if len(drawings) != len(preview.prompts):
            yield f"there are {len(drawings)} reference drawings for {len(preview.prompts)} prompts"
            return ""
        for name, values in picture_distance.mean_distances(pictures, drawings).items():
            if measured.get(name, {}).get("distance") != values:
                yield f"{paths.HELD_OUT}: the distances of {name} are not those of the pictures"
    try:
        expected = measurement_files.draw_sheet(preview, pictures, drawings, measured)
    except (KeyError, TypeError, ValueError, AttributeError):
        yield f"{paths.HELD_OUT} is not what the preview stage writes"
        return ""
    if read_regular(grid_file, MAX_TEXT) != expected:
        yield f"{paths.PREVIEW} is not the sheet of {paths.SAMPLES} and {paths.HELD_OUT}"
    return (
        f"the sheet, drawn again from {paths.SAMPLES} and {paths.HELD_OUT}, whose distances are its own: the same{note}"
    )


@check("chain/progress")
def check_progress(rebuild: Artifact, journal: Journal | None) -> Check:
    """milestones.csv has a row per milestone, and begins and ends with the losses of held-out.json; milestones.png is
    its sheet, and begins and ends with the pictures of build/samples. The pictures between are the sheet's own.
    """
    preview, last = rebuild.recipe.preview, len(require_journal(journal).rows)
    curve, sheet_file = require_output(rebuild, "milestones.csv"), require_output(rebuild, "milestones.png")
    measured = _read_measurements(require_output(rebuild, "held-out.json"))
    pictures = _read_samples(rebuild)
    steps = [*range(0, last, rebuild.recipe.train.milestone_every), last]
    if len(steps) > MAX_MODELS:
        raise Skip(f"{len(steps)} models; at most {MAX_MODELS} are compared")
    text = read_regular(curve, MAX_TEXT).decode("utf-8", "replace")
    losses = [_losses(line) for line in text.splitlines()[1:]]
    if len(losses) != len(steps):
        yield f"{paths.MILESTONES_CSV} has {len(losses)} rows; base, milestones and final model are {len(steps)}"
        return ""
    for number, model in ((0, "base"), (-1, "final")):
        if losses[number] != (measured.get(model, {}).get("loss") if measured.get("posts") else None):
            yield f"{paths.MILESTONES_CSV}: step {steps[number]} has another loss than {model} in {paths.HELD_OUT}"
    grid = measurement_files.grid_of(preview.prompts, len(steps), (preview.width, preview.height))
    sheet, _ = _read_picture(sheet_file, grid.size)
    models = {
        step: Measurement([_cut(sheet, grid, index, number) for index in range(len(preview.prompts))], losses[number])
        for number, step in enumerate(steps)
    }
    models[0], models[last] = (
        models[step]._replace(pictures=pictures[name]) for step, name in ((0, "base"), (last, "final"))
    )
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        csv, png = Path(temporary, "milestones.csv"), Path(temporary, "milestones.png")
        measurement_files.write_curve(csv, models)
        measurement_files.write_grid(png, preview.prompts, models)
        if text != csv.read_text(encoding="utf-8"):
            yield f"{paths.MILESTONES_CSV} has other steps, or numbers in another form, than the stage writes"
        if read_regular(sheet_file, MAX_TEXT) != png.read_bytes():
            yield f"{paths.MILESTONES_PNG} is not the sheet of {paths.MILESTONES_CSV} and {paths.SAMPLES}"
    return f"{len(steps)} rows; base and final model are those of {paths.SAMPLES} and {paths.HELD_OUT}"


def _losses(line: str) -> dict[str, float] | None:
    """The losses in a row of milestones.csv; None if it has none, NaN (equal to nothing) if it is no such row."""
    _, *cells = line.split(",")
    if cells == ["", ""]:
        return None
    try:
        sdxl, training = map(float, cells)
    except ValueError:
        sdxl = training = float("nan")
    return {"sdxl": sdxl, "training": training}


def _read_measurements(path: Path) -> dict[str, Any]:
    """The content of held-out.json. Raises UserError if it is not made of objects where the stage writes them."""
    try:
        content = json.loads(read_regular(path, MAX_TEXT))
        if isinstance(content, dict) and all(isinstance(content.get(name, {}), dict) for name in (*MODELS, "flat")):
            return content
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path} is not what the preview stage writes.")


def _read_samples(rebuild: Artifact) -> dict[str, list[np.ndarray]]:
    """The pictures of build/samples by model."""
    preview, folder = rebuild.recipe.preview, rebuild.folder / paths.SAMPLES
    files = {
        model: [folder / samples.sample_name(model, index) for index in range(len(preview.prompts))] for model in MODELS
    }
    if missing := [path.name for listed in files.values() for path in listed if not path.is_file()]:
        raise Skip(f"{paths.SAMPLES} lacks {format_some(missing)}")
    size = preview.width, preview.height
    return {model: [_read_picture(path, size)[0] for path in listed] for model, listed in files.items()}


def _cut(sheet: np.ndarray, grid: Grid, index: int, number: int) -> np.ndarray:
    """Picture `number` of prompt `index`, in its own size."""
    left, top, right, bottom = grid.box(index, number)
    return sheet[top : bottom : grid.scale, left : right : grid.scale]


def _without_hash(text: str) -> str:
    return re.sub(r"Model hash: [0-9a-f]*", "", text)


def _read_picture(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Pixels, uint8 RGB (H, W, 3), and settings of a PNG of `size` (width, height). Raises UserError for any other."""
    fault = UserError(f"{path} is not the PNG of {size[0]} x {size[1]} pixels that the preview stage writes.")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != size or image.mode != "RGB":
                raise fault
            return np.asarray(image), str(image.info.get(samples.TEXT, ""))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise fault from None
