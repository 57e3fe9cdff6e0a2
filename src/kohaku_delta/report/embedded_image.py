"""Invariant: a picture is carried in the page itself, as PNG or WebP of known size, with words for who does not see it."""

import base64
import io
import struct
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kohaku_delta.errors import UserError

MAGIC = b"\x89PNG\r\n\x1a\n"
WIDEST = 2400  # pixels: the release's preview has 8192, which no page needs
LARGEST = 64 << 20  # bytes


@dataclass(frozen=True)
class EmbeddedImage:
    name: str
    source: str  # data: URL
    width: int
    height: int
    alt: str


def embed_image(path: Path, alt: str) -> EmbeddedImage | None:
    """The PNG at `path`; None where it is not there."""
    if not path.is_file():
        return None
    content = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    if not content.startswith(MAGIC) or len(content) < 24:
        raise UserError(f"{path} is not a PNG of at most {LARGEST >> 20} MiB. Delete it and run its stage again.")
    width, height = struct.unpack(">II", content[16:24])
    kind = "png"
    if width > WIDEST:
        content, width, height, kind = *_smaller(content, path), "webp"
    return EmbeddedImage(
        path.stem, f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height, alt
    )


def _smaller(content: bytes, path: Path) -> tuple[bytes, int, int]:
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be decoded ({error}). Delete it and run its stage again.") from None
    small = small.resize((WIDEST, max(1, round(small.height * WIDEST / small.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "webp", quality=86, method=4)
    return file.getvalue(), *small.size
