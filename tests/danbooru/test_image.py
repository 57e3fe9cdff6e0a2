import io

import numpy as np
import pytest
from PIL import Image

from danbooru_factory import picture
from kohaku_delta.danbooru import image


def header_size(data):
    return image.webp_size(data[: image.HEAD], len(data))


def webps():
    rng = np.random.default_rng(3)
    for lossless in (False, True):
        for width, height in [(1, 1), (17, 5), (300, 1023), (16383, 2)]:
            yield picture(width, height, lossless=lossless)
    noise = Image.fromarray(rng.integers(0, 256, (40, 30, 4), np.uint8), "RGBA")
    for options in (
        {},
        {"lossless": True},
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"},
        {"save_all": True, "append_images": [noise.rotate(90)]},
    ):
        file = io.BytesIO()
        noise.save(file, "WEBP", **options)
        yield file.getvalue()


def test_webp_headers_give_the_sizes_that_pillow_gives():
    for data in webps():
        assert header_size(data) == image.image_size(io.BytesIO(data))


def test_a_truncated_webp_has_no_size():
    for data in webps():
        for part in range(1, 10):
            assert header_size(data[: len(data) * part // 10]) in ((0, 0), None)
    assert header_size(b"") is header_size(b"RIFF") is header_size(picture(kind="PNG")) is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_is_decoded_as_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    pixels = image.decode(picture(24, 16, kind, mode))
    assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8


def test_alpha_is_dropped_and_not_blended():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 200, 30, 0)).save(file, "PNG")
    assert (image.decode(file.getvalue()) == (10, 200, 30)).all()


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture(24, 16, "JPEG", exif=exif)
    assert image.image_size(io.BytesIO(data)) == (24, 16)
    assert image.decode(data).shape == (16, 24, 3)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (image.decode(file.getvalue()) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"GIF89a",
        picture()[:40],
        picture(kind="PNG")[:60],
        picture(900, 900, "JPEG")[:300],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_a_file_that_is_no_image_is_unreadable_and_nothing_worse(data):
    with pytest.raises(image.UnreadableImage):
        image.decode(data)


def test_a_decompression_bomb_is_unreadable_before_it_is_decoded():
    file = io.BytesIO()
    Image.new("1", (17000, 16000)).save(file, "PNG")
    for look in (image.decode, lambda data: image.image_size(io.BytesIO(data))):
        with pytest.raises(image.UnreadableImage, match="17000 x 16000"):
            look(file.getvalue())


def test_the_check_finds_exactly_what_decoding_finds():
    """decoded_size and decode agree on damaged files of every format."""
    rng, agreed = np.random.default_rng(7), {True: 0, False: 0}
    pixels = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    for kind, options in [
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("JPEG", {}),
        ("GIF", {}),
        ("BMP", {}),
    ]:
        file = io.BytesIO()
        pixels.save(file, kind, **options)
        for _ in range(60):
            data = bytearray(file.getvalue())
            for place in rng.integers(0, len(data), rng.integers(0, 4)):
                data[place] = rng.integers(256)
            data = bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
            try:
                height, width, _ = image.decode(data).shape
            except image.UnreadableImage:
                with pytest.raises(image.UnreadableImage):
                    image.decoded_size(data)
                agreed[False] += 1
            else:
                assert image.decoded_size(data) == (width, height)
                agreed[True] += 1
    assert min(agreed.values()) > 50
