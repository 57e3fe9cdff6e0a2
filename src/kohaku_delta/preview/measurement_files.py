"""The files that show measurements of checkpoints: the sheet preview.png, milestones.csv and milestones.png. The same
measurements give the same bytes. Needs no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kohaku_delta import atomic_files
from kohaku_delta.params import Preview
from kohaku_delta.preview import image_grid
from kohaku_delta.preview.image_grid import Grid

CURVE = "step,held_out_loss,held_out_loss_training\n"
CELL, SHEET = 256, 2400  # px: at most so wide are a picture, and a row of prompts side by side


class Measurement(NamedTuple):
    """pictures: one per prompt, uint8 RGB (height, width, 3); losses: {"sdxl": x, "training": y}, None without a
    held-out post.
    """

    pictures: list[np.ndarray]
    losses: dict[str, float] | None


def draw_sheet(
    preview: Preview, pictures: dict[str, list[np.ndarray]], drawings: list[np.ndarray] | None, measured: dict
) -> bytes:
    """PNG bytes of the grid. pictures: of "base" and "final", uint8 RGB (H, W, 3), one per prompt; drawings: the
    references; measured: as compare_base_and_final returns it.
    """
    title = f"no held-out loss: {measured.get('reason')}"
    if measured["posts"]:
        base, final = (measured[name]["loss"]["sdxl"] for name in ("base", "final"))
        title = f"held-out loss: base {base:.4f}, final {final:.4f}"
    distances = {name: measured[name]["distance"] for name in (*pictures, "flat")} if drawings else {}
    if drawings:
        base, final, flat = (distances[name]["mean"] for name in ("base", "final", "flat"))
        title += f"; mean distance to the drawing: base {base:.1f}, final {final:.1f}, one flat colour {flat:.1f}"
    shown = pictures | ({"drawing": drawings} if drawings else {})
    return image_grid.draw_grid(preview.prompts, shown, distances, preview.columns, title)


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
