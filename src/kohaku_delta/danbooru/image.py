"""Decodes images and reads their sizes. No image stops a run: whatever is wrong with one is raised as UnreadableImage.
Missing memory (MemoryError) and a file that cannot be read (OSError) are no faults of an image.

Images are decoded as the release's trainer saw them: the first frame of an animation, EXIF rotation not applied, alpha
dropped, CMYK and palettes as Pillow converts them.
"""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, features

from kohaku_delta.provenance import import_closure

MAX_PIXELS = 1 << 28  # the recipe's filter.max_pixels; what is decoded later was checked against it
HEAD = 32  # bytes of a WebP file that hold its size; Pillow would read the whole file, and all files are a terabyte
BYTES_PER_PIXEL = 16  # of memory at most while an image is decoded to RGB (measured: docs/performance.md)
FORMATS = ("WEBP", "PNG", "JPEG", "BMP", "GIF")  # Pillow's other formats never occur, and some run programs

Image.MAX_IMAGE_PIXELS = None  # its limit is global and only warns; ours is checked below, before anything is decoded


class UnreadableImage(Exception):
    """Why an image cannot be used."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB. Raises UnreadableImage, MemoryError."""
    return np.array(_decode_rgb(data, max_pixels))


def decoded_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels after the image was decoded as `decode` does, so both find the same faults. Without the
    copy into an array it takes a fifth less time. Raises UnreadableImage, MemoryError.
    """
    return _decode_rgb(data, max_pixels).size


@cache
def decoder_version() -> str:
    """What decides whether an image can be decoded: this module, Pillow and the libraries that it decodes with."""
    names = ("webp", "libjpeg_turbo", "jpg", "zlib", "zlib_ng")
    libraries = {name: features.version(name) for name in ("pil", *names)}
    code = import_closure.file_digest(Path(__file__).name, Path(__file__).read_bytes())
    return json.dumps({"code": code, **libraries}, sort_keys=True)


def image_size(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels, from the header of a file. Raises UnreadableImage."""
    with _open(file, max_pixels) as image:
        return image.size


def webp_size(head: bytes, length: int) -> tuple[int, int] | None:
    """(width, height) of a WebP file from its first HEAD bytes and its length; None for another format.

    (0, 0) if the header is invalid, or says that the file is longer than it is.
    """
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if length < 30 or length < int.from_bytes(head[4:8], "little") + 8:
        return 0, 0
    kind, width, height = head[12:16], 0, 0
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a" and not head[20] & 1:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    elif kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    return (width, height) if width and height else (0, 0)


def _decode_rgb(data: bytes, max_pixels: int) -> Image.Image:
    try:
        with _open(io.BytesIO(data), max_pixels) as image:
            return image.convert("RGB")
    except UnreadableImage:
        # libwebp reports missing memory as a damaged image: is there as much as it needs?
        width, height = webp_size(data[:HEAD], len(data)) or (0, 0)
        if width * height <= max_pixels:
            np.empty(BYTES_PER_PIXEL * width * height, np.uint8)
        raise


@contextmanager
def _open(file: BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ValueError(f"{width} x {height} pixels are more than {max_pixels:,}")
                if not width or not height:
                    raise ValueError("it has no pixels")
                yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds, and all are faults of the file
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # but this is the disk's: Pillow's own have no number
            raise
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None
