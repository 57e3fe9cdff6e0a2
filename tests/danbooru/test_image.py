import io

import cv2
import numpy as np
import pytest
from PIL import Image

from danbooru_factory import picture
from kohaku_delta.danbooru import image
from kohaku_delta.errors import UserError


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


def saved(pixels, kind="PNG", **options):
    file = io.BytesIO()
    pixels.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_a_16_bit_grey_the_upper_eight_bits_are_taken(kind):
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    data = saved(Image.fromarray(values), kind)
    assert (image.decode(data) == (values >> 8)[..., None]).all() and image.decoded_size(data) == (256, 256)
    if kind == "PNG":  # another library agrees
        assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) == image.decode(data)).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "CMYK"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_is_an_image_whatever_its_name_is(mode, compression):
    rng = np.random.default_rng(1)
    pixels = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).convert(mode)
    data = saved(pixels, "TIFF", compression=compression)
    assert (image.decode(data) == np.asarray(pixels.convert("RGB"))).all()
    assert image.image_size(io.BytesIO(data)) == image.decoded_size(data) == (30, 20)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_unreadable_and_not_cut_off(kind):
    data = saved(Image.fromarray(np.arange(64, dtype=kind).reshape(8, 8)), "TIFF")
    for look in (image.decode, image.decoded_size, lambda data: image.image_size(io.BytesIO(data))):
        with pytest.raises(image.UnreadableImage, match="neither 8 nor 16 bits"):
            look(data)


WHITE = image.Decoding(alpha_background=(255, 255, 255))


def test_a_background_is_seen_through_alpha_as_the_formula_says():
    rng = np.random.default_rng(2)
    rgba = rng.integers(0, 256, (40, 50, 4), np.uint8)
    rgba[:5, :, 3], rgba[5:10, :, 3] = 0, 255
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    for background in ((255, 255, 255), (0, 0, 0), (10, 200, 30)):
        found = image.decode(saved(Image.fromarray(rgba)), decoding=image.Decoding(alpha_background=background))
        assert np.abs(found - (colour * alpha + np.array(background) * (1 - alpha))).max() <= 1
        assert (found[:5] == background).all() and (found[5:10] == rgba[5:10, :, :3]).all()


def transparent_pictures():
    """Pictures of one transparent colour, as the formats have transparency."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    yield saved(Image.new("RGBA", (4, 4), (1, 2, 3, 0)))
    yield saved(Image.new("LA", (4, 4), (7, 0)))
    yield saved(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    yield saved(Image.new("L", (4, 4), 9), transparency=9)
    yield saved(palette, transparency=1)
    yield saved(palette, "GIF", transparency=1)
    yield saved(Image.new("RGBA", (4, 4), (1, 2, 3, 0)), "WEBP", lossless=True, exact=True)


def test_every_kind_of_transparency_shows_the_background_and_none_by_default():
    for data in transparent_pictures():
        assert (image.decode(data, decoding=WHITE) == 255).all()
        assert (image.decode(data) < 255).all()


def test_a_background_changes_no_opaque_picture():
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        data = picture(24, 16, kind)
        assert (image.decode(data, decoding=WHITE) == image.decode(data)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation_turns_a_picture_as_another_library_does(kind, orientation):
    pixels = Image.fromarray(np.kron(np.arange(0, 240, 10, np.uint8).reshape(4, 6), np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(pixels.convert("RGB"), kind, exif=exif, **{"quality": 100} if kind == "JPEG" else {"lossless": True})
    found = image.decode(data, decoding=image.Decoding(exif_rotation=True))
    turned = {2: "fliplr", 3: "rot180", 4: "flipud", 5: "transpose", 6: "rot270", 7: "anti", 8: "rot90"}
    flat = image.decode(data)
    expected = {
        "fliplr": lambda: flat[:, ::-1], "flipud": lambda: flat[::-1], "rot180": lambda: flat[::-1, ::-1],
        "transpose": lambda: flat.transpose(1, 0, 2), "anti": lambda: flat[::-1, ::-1].transpose(1, 0, 2),
        "rot270": lambda: np.rot90(flat, -1), "rot90": lambda: np.rot90(flat),
    }.get(turned.get(orientation), lambda: flat)()  # fmt: skip
    assert np.array_equal(found, expected)
    size = image.decoded_size(data, decoding=image.Decoding(exif_rotation=True))
    assert size == (found.shape[1], found.shape[0])
    if kind == "JPEG":
        read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert read.shape == found.shape and np.abs(read[..., ::-1].astype(int) - found).max() <= 2


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"\xff" * 40])
def test_an_orientation_that_cannot_be_read_turns_nothing(exif):
    data = picture(24, 16, "JPEG", exif=exif)
    assert image.decode(data, decoding=image.Decoding(exif_rotation=True)).shape == (16, 24, 3)


WEBP_SET = image.Decoding(reencode_webp=True)


@pytest.mark.ci
@pytest.mark.parametrize(
    "size, expected", [((96, 64), (96, 64)), ((4096, 2048), (2896, 1448)), ((2049, 2048), (2048, 2047))]
)
def test_a_reencoded_picture_has_the_pixels_that_pillow_gives_a_file_made_like_the_webp_set(size, expected):
    rng = np.random.default_rng(3)
    pixels = Image.fromarray(rng.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), np.uint8)).resize(size)
    data = saved(pixels)
    assert expected[0] * expected[1] <= 2048 * 2048
    smaller = pixels if size == expected else pixels.resize(expected, Image.Resampling.BICUBIC)
    made = saved(smaller, "WEBP", quality=90)
    found = image.decode(data, decoding=WEBP_SET)
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(made)).convert("RGB")))
    assert image.decoded_size(data, decoding=WEBP_SET) == expected == found.shape[1::-1]
    assert np.array_equal(found, image.decode(data, decoding=WEBP_SET))
    assert not np.array_equal(found[:64, :64], image.decode(data)[:64, :64])  # other bytes than the original's


def test_a_picture_that_webp_has_no_room_for_is_unreadable_if_it_is_reencoded():
    for size in ((20_000, 2), (1, 16_384)):
        data = saved(Image.new("RGB", size))
        assert image.decoded_size(data) == size
        for read in (image.decode, image.decoded_size):
            with pytest.raises(image.UnreadableImage, match="WebP has no sides above 16383"):
                read(data, decoding=WEBP_SET)


def test_any_size_fits_the_webp_sets_limit():
    rng = np.random.default_rng(4)
    for width, height in rng.integers(1, 30_000, (2000, 2)).tolist():
        try:
            found = image.webp_set_size(width, height)
        except image.UnreadableImage:
            continue
        assert 0 < found[0] * found[1] <= max(2048 * 2048, 16383) and max(found) <= 16383
        if width * height <= 2048 * 2048:
            assert found == (width, height)


def test_how_images_are_decoded_travels_with_the_posts():
    assert image.RELEASE.metadata == {} and image.Decoding.of_posts(None) == image.RELEASE
    for decoding in (WHITE, WEBP_SET, image.Decoding(exif_rotation=True)):
        stored = {key.encode(): value.encode() for key, value in decoding.metadata.items()}
        assert image.Decoding.of_posts(stored) == decoding
    for text in (b"", b"[]", b'{"alpha_background": [1, 2]}', b'{"alpha_background": [1, 2, 256]}', b'{"x": 1}'):
        with pytest.raises(UserError, match="does not say in a known way how its images are decoded"):
            image.Decoding.of_posts({b"decoding": text})


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
        ("TIFF", {"compression": "tiff_lzw"}),
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
