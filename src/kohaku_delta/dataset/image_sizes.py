"""Invariant: an image's width and height are those of its file in the tar, the same by header and by decoding; 0 for
what cannot be read.

The index of the tars knows what webp headers say; other headers are read here. Decoding looks at every pixel: a few
hours a million images and processor, so it is spread over processes. How many there are decides time, never a result.
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
TASK = 64  # images that a process is given at a time


def sizes_by_header(path: Path, held: TarMembers, place: np.ndarray, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights (int32) of the members at `place` of one tar."""
    width, height = held.width[place], held.height[place]
    with open(path, "rb", buffering=0) as file:
        for row in np.flatnonzero((width == UNKNOWN) & held.sound[place]).tolist():
            member = _MemberReader(file.fileno(), int(held.offset[place[row]]), int(held.size[place[row]]))
            try:
                width[row], height[row] = image.image_size(io.BufferedReader(member), max_pixels)
            except image.UnreadableImage:
                width[row] = 0
    good = held.sound[place] & (width.astype(np.int64) * height <= max_pixels) & (width > 0)
    return np.where(good, width, 0), np.where(good, height, 0)


def sizes_by_decoding(
    paths: list[Path], offset: np.ndarray, size: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same of images in any tars, after every pixel was decoded. paths, offset, size: one entry an image."""
    cuts = range(0, len(paths), TASK)
    tasks = [
        (
            paths[start : start + TASK],
            offset[start : start + TASK].tolist(),
            size[start : start + TASK].tolist(),
            max_pixels,
        )
        for start in cuts
    ]
    found = np.zeros((len(paths), 2), np.int32)
    with tqdm(total=len(paths), desc="images decoded", unit=" images", unit_scale=True, disable=None) as bar:
        for start, part in zip(
            cuts, _process_map(tasks) if len(paths) > FEW else map(_decoded_sizes, tasks), strict=True
        ):
            found[start : start + TASK] = part
            bar.update(len(part))
    return found[:, 0], found[:, 1]


def _process_map(tasks: list) -> Iterator:
    count = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=audit_hook.install_hook,
        initargs=audit_hook.current_policy(),
    ) as pool:
        yield from pool.map(_decoded_sizes, tasks)


def _decoded_sizes(task: tuple) -> list[tuple[int, int]]:
    """(width, height) of each image of a task."""
    found = []
    for path, offset, size in zip(*task[:3], strict=True):
        try:
            with open(path, "rb", buffering=0) as file:
                height, width, _ = image.decode(pread_fully(file.fileno(), offset, size), task[3]).shape
            found.append((width, height))
        except image.UnreadableImage:
            found.append((0, 0))
    return found


class _MemberReader(io.RawIOBase):
    """A member of a tar as a file, of which only what is asked for is read."""

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
        data = os.pread(
            self.descriptor, max(0, min(len(buffer), self.size - self.position)), self.offset + self.position
        )
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
