"""The preview's grid: per prompt a row of named pictures side by side, with the prompt above it.

The same pictures and labels give the same PNG.
"""

import io
import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, FONT_SIZE = 12, 15, 12  # px
MIN_WIDTH = 192  # px: smaller pictures are enlarged by a whole factor


@dataclass(frozen=True)
class Grid:
    """Where the pictures are. width, height: of a picture, in pixels of the grid; scale: its enlargement."""

    prompts: list[list[str]]  # in lines
    scale: int
    width: int
    height: int
    columns: int
    pictures: int  # of each prompt

    @classmethod
    def of(cls, prompts: list[str], pictures: int, size: tuple[int, int], columns: int) -> "Grid":
        """The grid of `pictures` per prompt, of `size` (width, height)."""
        scale = max(1, -(-MIN_WIDTH // size[0]))
        width, height = size[0] * scale, size[1] * scale
        wrapped = [textwrap.wrap(prompt, max(16, pictures * width // 6))[:4] for prompt in prompts]
        return cls(wrapped, scale, width, height, columns, pictures)

    @property
    def head(self) -> int:
        return LINE * (max(map(len, self.prompts)) + 1) + 4

    @property
    def cell(self) -> tuple[int, int]:
        return self.pictures * (self.width + 2) + 2 * MARGIN, self.height + self.head + MARGIN

    @property
    def size(self) -> tuple[int, int]:
        rows = -(-len(self.prompts) // self.columns)
        return self.cell[0] * self.columns + MARGIN, self.cell[1] * rows + 2 * LINE + MARGIN

    def corner(self, index: int) -> tuple[int, int]:
        """The upper left corner of a prompt's cell."""
        return MARGIN + self.cell[0] * (index % self.columns), 2 * LINE + self.cell[1] * (index // self.columns)

    def box(self, index: int, number: int) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of picture `number` of a prompt."""
        left, top = self.corner(index)
        x, y = left + number * (self.width + 2), top + self.head
        return x, y, x + self.width, y + self.height


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
    grid = Grid.of(prompts, len(pictures), (first.shape[1], first.shape[0]), columns)
    font = ImageFont.load_default(FONT_SIZE)
    sheet = Image.new("RGB", grid.size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    for index, lines in enumerate(grid.prompts):
        left, top = grid.corner(index)
        for number, line in enumerate(lines):
            pen.text((left, top + LINE * number), line, fill="black", font=font)
        for number, (name, drawn) in enumerate(pictures.items()):
            x, y, *_ = grid.box(index, number)
            label = f"{name}, distance {distances[name][f'prompt-{index}']:.1f}" if name in distances else name
            pen.text((x, y - LINE - 2), label, fill="#555555", font=font)
            size = grid.width, grid.height
            sheet.paste(Image.fromarray(drawn[index]).resize(size, Image.Resampling.NEAREST), (x, y))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
