"""Reference drawings, which show what a prompt says: one per prompt, of the preview's size, or none at all.

The miniature has them (`download.inputs.references`, from its own drawing code); the release has none.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import Preview


def read_references(parameters: Preview, inputs: Path, folder: Path | None) -> list[np.ndarray] | None:
    """The reference of each prompt, uint8 RGB (height, width, 3); None if there are none. inputs: inputs.json; folder:
    read its PNG files instead.
    """
    paths = sorted(folder.glob("*.png")) if folder else inputs_manifest.optional_paths(inputs, "references")
    if not paths and not folder:
        return None
    if len(paths) != len(parameters.prompts):
        source = f"{folder} has" if folder else "download.inputs.references has"
        raise UserError(
            f"{source} {len(paths)} pictures and preview.prompts has {len(parameters.prompts)} prompts. "
            "Give one picture per prompt, in the prompts' order, or none."
        )
    return [_read_picture(path, (parameters.width, parameters.height)) for path in paths]


def _read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{path}, a reference picture of the preview, cannot be read as an image. "
            "Replace it, and update its pin in download.inputs.references."
        ) from None
    if pixels.shape[1::-1] != size:
        raise UserError(
            f"{path} is {pixels.shape[1]}×{pixels.shape[0]}; preview.width and preview.height say {size[0]}×{size[1]}. "
            "Make both the same."
        )
    return pixels
