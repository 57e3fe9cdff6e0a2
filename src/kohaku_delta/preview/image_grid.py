"""Invariant: the same pictures and labels give the same PNG: per prompt one row of named pictures side by side, the
prompt above.
"""

import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, SIZE = 12, 15, 12


def draw_grid(
    prompts: list[str],
    pictures: dict[str, list[np.ndarray]],
    distances: dict[str, dict[str, float]],
    columns: int,
    caption: str,
) -> bytes:
    """PNG bytes. pictures: name → one per prompt, (H, W, 3) uint8, all of one size, shown at least 192 px wide;
    distances: as picture_distance.measure gives them, or empty.
    """
    first = next(iter(pictures.values()))[0]
    scale = max(1, -(-192 // first.shape[1]))
    height, width = first.shape[0] * scale, first.shape[1] * scale
    font = ImageFont.load_default(SIZE)
    labels = [textwrap.wrap(prompt, max(16, len(pictures) * width // 6))[:4] for prompt in prompts]
    head = LINE * (max(map(len, labels)) + 1) + 4
    cell = (len(pictures) * (width + 2) + 2 * MARGIN, height + head + MARGIN)
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (cell[0] * columns + MARGIN, cell[1] * rows + 2 * LINE + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN // 2), caption, fill="black", font=font)
    for index, lines in enumerate(labels):
        left, top = MARGIN + cell[0] * (index % columns), 2 * LINE + cell[1] * (index // columns)
        for number, line in enumerate(lines):
            pen.text((left, top + LINE * number), line, fill="black", font=font)
        for place, (name, drawn) in enumerate(pictures.items()):
            offset = place * (width + 2)
            label = f"{name}, distance {distances[name][f'prompt-{index}']:.1f}" if name in distances else name
            pen.text((left + offset, top + head - LINE - 2), label, fill="#555555", font=font)
            shown = Image.fromarray(drawn[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + offset, top + head))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()
