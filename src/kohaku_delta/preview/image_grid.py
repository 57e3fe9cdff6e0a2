"""The preview's grid: per prompt a row of named pictures side by side, with the prompt above it.

The same pictures and labels give the same PNG.
"""

import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, FONT_SIZE = 12, 15, 12  # px
MIN_WIDTH = 192  # px: smaller pictures are enlarged by a whole factor


def draw_grid(
    prompts: list[str],
    pictures: dict[str, list[np.ndarray]],
    distances: dict[str, dict[str, float]],
    columns: int,
    title: str,
) -> bytes:
    """PNG bytes. pictures: name → one per prompt, uint8 RGB (H, W, 3), all of one size; distances: as
    picture_distance.mean_distances returns them, or empty.
    """
    first = next(iter(pictures.values()))[0]
    scale = max(1, -(-MIN_WIDTH // first.shape[1]))
    height, width = first.shape[0] * scale, first.shape[1] * scale
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [textwrap.wrap(prompt, max(16, len(pictures) * width // 6))[:4] for prompt in prompts]
    head = LINE * (max(map(len, wrapped)) + 1) + 4
    cell_width, cell_height = len(pictures) * (width + 2) + 2 * MARGIN, height + head + MARGIN
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (cell_width * columns + MARGIN, cell_height * rows + 2 * LINE + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    for index, lines in enumerate(wrapped):
        left, top = MARGIN + cell_width * (index % columns), 2 * LINE + cell_height * (index // columns)
        for number, line in enumerate(lines):
            pen.text((left, top + LINE * number), line, fill="black", font=font)
        for number, (name, drawn) in enumerate(pictures.items()):
            x = left + number * (width + 2)
            label = f"{name}, distance {distances[name][f'prompt-{index}']:.1f}" if name in distances else name
            pen.text((x, top + head - LINE - 2), label, fill="#555555", font=font)
            shown = Image.fromarray(drawn[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (x, top + head))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
