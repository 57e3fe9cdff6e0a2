"""Invariant: no image stops a run. Bytes become (H, W, 3) uint8 RGB, or a size, or `Unreadable` with the reason;
nothing else is raised.

As the release's trainer saw images: the first frame of an animation, EXIF rotation not applied, alpha dropped, CMYK and
palettes as Pillow converts them. The header check reads a few bytes of a file: RIFF headers of webp are read in bulk,
other formats by Pillow.
"""

import io
import warnings

import numpy as np
from PIL import Image

MAX_PIXELS = 1 << 28  # the recipe's filter.max_pixels; what is decoded later was checked against it
HEAD = 32  # bytes that say all about a webp file's size
FORMATS = ("WEBP", "PNG", "JPEG", "BMP", "GIF")  # Pillow's other formats run programs or never occur

Image.MAX_IMAGE_PIXELS = None  # its limit is global and only warns; ours is checked below, before anything is decoded


class UnreadableImage(Exception):
    """Why bytes are no image that can be trained on."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB. Raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _limit(image.size, max_pixels)
                return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises a dozen kinds, none of which is a fault of ours
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def image_size(file, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels from the header of a binary file object. Raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                _limit(image.size, max_pixels)
                return image.size
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def webp_sizes(heads: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of many webp files at once, from their first HEAD bytes (n, HEAD) uint8 (zeros behind a shorter file) and
    lengths int64.

    Gives (webp, width, height): whether the file begins as webp does, and its size, (0, 0) where the file is shorter
    than its header says or the header is not a picture's.
    """
    head = np.ascontiguousarray(heads.T).astype(np.int32)  # byte by byte
    webp = _matches(head, 0, b"RIFF") & _matches(head, 8, b"WEBP")
    announced = head[4] | head[5] << 8 | head[6] << 16 | head[7].astype(np.int64) << 24
    lossy = _matches(head, 12, b"VP8 ") & _matches(head, 23, b"\x9d\x01\x2a") & (head[20] & 1 == 0)
    lossless = _matches(head, 12, b"VP8L") & (head[20] == 0x2F)
    extended = _matches(head, 12, b"VP8X")
    bits = head[21] | head[22] << 8 | head[23] << 16 | head[24] << 24
    width = np.select(
        [lossy, lossless, extended],
        [(head[26] | head[27] << 8) & 0x3FFF, (bits & 0x3FFF) + 1, (head[24] | head[25] << 8 | head[26] << 16) + 1],
        0,
    )
    height = np.select(
        [lossy, lossless, extended],
        [
            (head[28] | head[29] << 8) & 0x3FFF,
            (bits >> 14 & 0x3FFF) + 1,
            (head[27] | head[28] << 8 | head[29] << 16) + 1,
        ],
        0,
    )
    whole = webp & (announced + 8 <= lengths) & (lengths >= 30) & (width > 0) & (height > 0)
    return webp, np.where(whole, width, 0), np.where(whole, height, 0)


def _matches(head: np.ndarray, place: int, mark: bytes) -> np.ndarray:
    return np.logical_and.reduce([head[place + each] == byte for each, byte in enumerate(mark)])


def _limit(extent: tuple[int, int], max_pixels: int) -> None:
    if extent[0] * extent[1] > max_pixels:
        raise ValueError(f"{extent[0]} x {extent[1]} pixels are more than {max_pixels:,}")
    if 0 in extent:
        raise ValueError("it has no pixels")
