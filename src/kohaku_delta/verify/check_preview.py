"""The check chain/samples: the pictures of build/samples are those of preview.png, and name the checkpoints of this
build.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.preview import samples
from kohaku_delta.preview.image_grid import Grid
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.verify.check_chain import require_output
from kohaku_delta.verify.findings import Check, Skip, check

MODELS = {"base": paths.BASE, "final": paths.FINAL}  # in the order of the grid; the reference drawings follow


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
        yield f"{paths.SAMPLES}/{name} {'is no picture of the preview' if name in found else 'does not exist'}"
    hashes = {model: rebuild.sha256(out) for model, out in MODELS.items()}
    for name in sorted(found & expected.keys()):
        number, model, index = expected[name]
        picture, text = _read_picture(folder / name, (preview.width, preview.height))
        left, top, right, bottom = grid.box(index, number)
        if not np.array_equal(picture, sheet[top : bottom : grid.scale, left : right : grid.scale]):
            yield f"{paths.SAMPLES}/{name} is not the picture in preview.png"
        sha256 = hashes[model]
        settings = samples.parameters_text(preview, index, Path(MODELS[model]).stem, sha256 or "")
        if text != settings and (sha256 or _without_hash(text) != _without_hash(settings)):
            yield f"{paths.SAMPLES}/{name} names other settings, or another checkpoint, than this build has"
    unknown = [MODELS[model] for model, sha256 in hashes.items() if sha256 is None]
    note = f"; the hash of {', '.join(unknown)} is not known here" if unknown else ""
    return f"{len(expected)} pictures, each as in preview.png and with the settings of params.yaml{note}"


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
