"""Decodes images and reads their sizes. No image stops a run: whatever is wrong with one is raised as UnreadableImage.
Missing memory (MemoryError) and a file that cannot be read (OSError) are no faults of an image.

Images are decoded as the release's trainer saw them: the first frame of an animation, EXIF rotation not applied, alpha
dropped, CMYK and palettes as Pillow converts them. Of 16-bit greys the upper eight bits are taken; the trainer
got two levels. A recipe may ask for another background, for rotation, and for the pixels that a re-encoding gives as
the webp set was made (Decoding).
"""

import io
import json
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, features
from pydantic import ValidationError

from kohaku_delta.errors import UserError
from kohaku_delta.params import Byte
from kohaku_delta.provenance import import_closure
from kohaku_delta.strict_model import StrictModel

MAX_PIXELS = 1 << 28  # the recipe's filter.max_pixels; what is decoded later was checked against it
HEAD = 32  # bytes of a WebP file that hold its size; Pillow would read the whole file, and all files are a terabyte
BYTES_PER_PIXEL = 16  # of memory at most while an image is decoded to RGB (measured: docs/performance.md)
FORMATS = ("WEBP", "PNG", "JPEG", "BMP", "GIF", "TIFF")  # by content, not by name; some of Pillow's others run programs
DECODING_KEY = "decoding"  # in the metadata of posts.parquet
# The webp set that the release was trained on: at most so many pixels (bicubic), then WebP of this quality
WEBP_PIXELS, WEBP_QUALITY, WEBP_SIDE = 2048 * 2048, 90, 16383

Image.MAX_IMAGE_PIXELS = None  # its limit is global and only warns; ours is checked below, before anything is decoded


class UnreadableImage(Exception):
    """Why an image cannot be used."""


class Decoding(StrictModel):
    """What a recipe may change in how images are decoded (filter.alpha_background, exif_rotation, reencode_webp)."""

    alpha_background: tuple[Byte, Byte, Byte] | None = None  # RGB behind transparent pixels; None: alpha is dropped
    exif_rotation: bool = False  # whether a picture is turned as its EXIF orientation says
    reencode_webp: bool = False  # whether the pixels are those of a re-encoding as in the webp set

    @property
    def metadata(self) -> dict[str, str]:
        """What the filter stage writes into posts.parquet, so that the training decodes as filter did; nothing if the
        release did the same.
        """
        return {} if self == RELEASE else {DECODING_KEY: self.model_dump_json()}

    @classmethod
    def of_posts(cls, metadata: dict[bytes, bytes] | None) -> "Decoding":
        """That of a table of posts, by the metadata of its schema. Raises UserError if it cannot be read."""
        try:
            return cls.model_validate_json((metadata or {}).get(DECODING_KEY.encode(), b"{}"))
        except ValidationError:
            raise UserError(
                f"posts.parquet does not say in a known way how its images are decoded (metadata {DECODING_KEY!r}). "
                "Run the filter stage again."
            ) from None


RELEASE = Decoding()


def decode(data: bytes, max_pixels: int = MAX_PIXELS, decoding: Decoding = RELEASE) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB. Raises UnreadableImage, MemoryError."""
    image = _decode_rgb(data, max_pixels, decoding)
    return np.array(_reencode(image) if decoding.reencode_webp else image)


def decoded_size(data: bytes, max_pixels: int = MAX_PIXELS, decoding: Decoding = RELEASE) -> tuple[int, int]:
    """(width, height) in pixels after the image was decoded as `decode` does, so both find the same faults. Without the
    copy into an array it takes a fifth less time. Raises UnreadableImage, MemoryError.
    """
    size = _decode_rgb(data, max_pixels, decoding).size
    return webp_set_size(*size) if decoding.reencode_webp else size


@cache
def decoder_version() -> str:
    """What decides whether an image can be decoded: this module, Pillow and the libraries that it decodes with."""
    names = ("webp", "libjpeg_turbo", "jpg", "zlib", "zlib_ng", "libtiff")
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


def webp_set_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) in the webp set's limit of pixels: both sides scaled alike and rounded down. Raises
    UnreadableImage for a side that WebP has no room for.
    """
    if width * height > WEBP_PIXELS:
        scale = (WEBP_PIXELS / (width * height)) ** 0.5
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    if max(width, height) > WEBP_SIDE:
        raise UnreadableImage(f"{width} x {height} pixels: WebP has no sides above {WEBP_SIDE}")
    return width, height


def _reencode(image: Image.Image) -> Image.Image:
    """The pixels after the image was made smaller and encoded as in the webp set."""
    size = webp_set_size(*image.size)
    file = io.BytesIO()
    (image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)).save(
        file, "WEBP", quality=WEBP_QUALITY
    )
    with Image.open(file, formats=["WEBP"]) as encoded:
        return encoded.convert("RGB")


def _decode_rgb(data: bytes, max_pixels: int, decoding: Decoding) -> Image.Image:
    try:
        with _open(io.BytesIO(data), max_pixels) as image:
            if decoding.exif_rotation:
                _rotate(image)
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if decoding.alpha_background is not None and image.has_transparency_data:
                layer = image.convert("RGBA")
                below = Image.new("RGB", layer.size, decoding.alpha_background)
                below.paste(layer, mask=layer)
                return below
            return image.convert("RGB")
    except UnreadableImage:
        # libwebp reports missing memory as a damaged image: is there as much as it needs?
        width, height = webp_size(data[:HEAD], len(data)) or (0, 0)
        if width * height <= max_pixels:
            np.empty(BYTES_PER_PIXEL * width * height, np.uint8)
        raise


def _rotate(image: Image.Image) -> None:
    """Turns the image as its EXIF orientation says; an orientation that cannot be read is none."""
    with suppress(SyntaxError, ValueError, TypeError, KeyError, AttributeError, IndexError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)


@contextmanager
def _open(file: BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                if image.mode in ("I", "F"):  # of TIFF; as what should 32 bits or a fraction be shown?
                    raise ValueError("its pixels have neither 8 nor 16 bits")
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
