"""Widths and heights of the images in tars by their headers; 0 for an image whose header cannot be read.

The index of the tars has the sizes of WebP files; other headers are read here. image_decoding reads every pixel.
"""

import io
import os
from pathlib import Path

import numpy as np

from kohaku_delta.danbooru import image, tars
from kohaku_delta.danbooru.tar_index import UNKNOWN, TarMembers


def sizes_by_header(
    path: Path, members: TarMembers, rows: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights (int32) of these members of one tar. Raises UserError if the tar cannot be read."""
    width, height, sound = members.width[rows], members.height[rows], members.sound[rows]
    with open(path, "rb", buffering=0) as file:
        for place in np.flatnonzero((width == UNKNOWN) & sound).tolist():
            offset, size = int(members.offset[rows[place]]), int(members.size[rows[place]])
            member = _MemberReader(file.fileno(), offset, size)
            try:
                width[place], height[place] = image.image_size(io.BufferedReader(member), max_pixels)
            except image.UnreadableImage:
                width[place] = 0
            except OSError as error:
                raise tars.read_error(path, offset, size, error) from None
    good = sound & (width.astype(np.int64) * height <= max_pixels) & (width > 0)
    return np.where(good, width, 0), np.where(good, height, 0)


class _MemberReader(io.RawIOBase):
    """A member of a tar as a file, so that Pillow reads only its header."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self.descriptor, self.offset, self.size, self.position = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.size - self.position))
        data = os.pread(self.descriptor, count, self.offset + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
