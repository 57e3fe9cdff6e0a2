"""Widths and heights of the images in tars, by header or by decoding every pixel; 0 for an image that cannot be read.

The index of the tars has the sizes of WebP files; other headers are read here. Decoding takes a few hours per million
images and processor, so it is spread over processes. Their number never changes a result.
"""

import io
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kohaku_delta.danbooru import image
from kohaku_delta.danbooru.tar_index import UNKNOWN, TarMembers
from kohaku_delta.danbooru.tars import pread_fully
from kohaku_delta.sandbox import audit_hook

FEW = 1000  # images that are decoded sooner than processes start
TASK = 64  # images per task of a process

Task = tuple[list[Path], list[int], list[int], int]  # paths, offsets, sizes, max_pixels


def sizes_by_header(
    path: Path, members: TarMembers, rows: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights (int32) of these members of one tar."""
    width, height, sound = members.width[rows], members.height[rows], members.sound[rows]
    with open(path, "rb", buffering=0) as file:
        for place in np.flatnonzero((width == UNKNOWN) & sound).tolist():
            member = _MemberReader(file.fileno(), int(members.offset[rows[place]]), int(members.size[rows[place]]))
            try:
                width[place], height[place] = image.image_size(io.BufferedReader(member), max_pixels)
            except image.UnreadableImage:
                width[place] = 0
    good = sound & (width.astype(np.int64) * height <= max_pixels) & (width > 0)
    return np.where(good, width, 0), np.where(good, height, 0)


def sizes_by_decoding(
    paths: list[Path], offset: np.ndarray, size: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same of images in any tars, after every pixel was decoded. paths, offset, size: one entry per image."""
    tasks: list[Task] = [
        (paths[start:stop], offset[start:stop].tolist(), size[start:stop].tolist(), max_pixels)
        for start, stop in ((start, start + TASK) for start in range(0, len(paths), TASK))
    ]
    sizes: list[tuple[int, int]] = []
    with tqdm(total=len(paths), desc="images decoded", unit=" images", unit_scale=True, disable=None) as bar:
        for part in _process_map(tasks) if len(paths) > FEW else map(_decoded_sizes, tasks):
            sizes += part
            bar.update(len(part))
    width, height = np.array(sizes, np.int32).reshape(-1, 2).T
    return width, height


def _process_map(tasks: list[Task]) -> Iterator[list[tuple[int, int]]]:
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=audit_hook.install_hook,
        initargs=audit_hook.current_policy(),
    ) as pool:
        yield from pool.map(_decoded_sizes, tasks)


def _decoded_sizes(task: Task) -> list[tuple[int, int]]:
    """(width, height) of each image of a task."""
    paths, offsets, sizes, max_pixels = task
    found = []
    for path, offset, size in zip(paths, offsets, sizes, strict=True):
        try:
            with open(path, "rb", buffering=0) as file:
                height, width, _ = image.decode(pread_fully(file.fileno(), offset, size), max_pixels).shape
            found.append((width, height))
        except image.UnreadableImage:
            found.append((0, 0))
    return found


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
