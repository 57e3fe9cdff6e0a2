"""Guarantee: either every prompt has its reference drawing, of the preview's size, or the recipe has none; anything
else is refused.

A reference shows what a prompt says. The miniature has them (`download.inputs.references`, drawn by its own drawing
code); the release has none.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import Preview


def read_references(parameters: Preview, listed: Path, folder: Path | None) -> list[np.ndarray] | None:
    """The reference of each prompt, uint8 RGB (height, width, 3); None if there are none. listed: inputs.json; folder:
    PNG files named in its stead.
    """
    paths = sorted(folder.glob("*.png")) if folder else inputs_manifest.optional_paths(listed, "references")
    if not paths and not folder:
        return None
    if len(paths) != len(parameters.prompts):
        held = f"{folder} holds" if folder else "download.inputs.references has"
        raise UserError(
            f"{held} {len(paths)} pictures and preview.prompts has {len(parameters.prompts)} prompts. Give one picture per prompt, in the prompts' order, or none."
        )
    return [_picture(path, (parameters.width, parameters.height)) for path in paths]


def _picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{path}, a reference picture of the preview, cannot be read as an image. Replace it, and pin it anew in download.inputs.references."
        ) from None
    if pixels.shape[1::-1] != size:
        raise UserError(
            f"{path} is {pixels.shape[1]}×{pixels.shape[0]}; preview.width and preview.height say {size[0]}×{size[1]}. Make both the same."
        )
    return pixels
