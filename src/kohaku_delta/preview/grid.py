"""Invariant: the same pictures and labels give the same PNG: a pair a prompt, base beside final, the prompt above."""

import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, SIZE = 12, 15, 12


def draw(prompts: list[str], base: list[np.ndarray], final: list[np.ndarray], columns: int, caption: str) -> bytes:
    """PNG bytes; pictures are (H, W, 3) uint8, all of one size, shown at least 192 px wide."""
    scale = max(1, -(-192 // base[0].shape[1]))
    height, width = base[0].shape[0] * scale, base[0].shape[1] * scale
    font = ImageFont.load_default(SIZE)
    labels = [textwrap.wrap(prompt, max(16, 2 * width // 6))[:4] for prompt in prompts]
    head = LINE * (max(map(len, labels)) + 1) + 4
    cell = (2 * width + 2 * MARGIN, height + head + MARGIN)
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (cell[0] * columns + MARGIN, cell[1] * rows + 2 * LINE + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN // 2), caption, fill="black", font=font)
    for index, lines in enumerate(labels):
        left, top = MARGIN + cell[0] * (index % columns), 2 * LINE + cell[1] * (index // columns)
        for number, line in enumerate(lines):
            pen.text((left, top + LINE * number), line, fill="black", font=font)
        for offset, name, picture in ((0, "base", base[index]), (width + 2, "final", final[index])):
            pen.text((left + offset, top + head - LINE - 2), name, fill="#555555", font=font)
            shown = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + offset, top + head))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()
