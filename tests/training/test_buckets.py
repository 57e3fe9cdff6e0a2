"""Buckets and geometry against the release's figures and a scalar reading of sd-scripts v0.8.3."""

import numpy as np
import pytest

from kohaku_delta.params import load
from kohaku_delta.training import buckets

RELEASE = load("params.yaml").schedule
# the first 33 lines of the published bucket.txt
PUBLISHED = [
    (256, 3328), (256, 3392), (256, 3456), (256, 3520), (256, 3584), (256, 3648), (256, 3712), (256, 3776),
    (256, 3840), (256, 3904), (256, 3968), (256, 4032), (256, 4096), (320, 2752), (320, 2816), (320, 2880),
    (320, 2944), (320, 3008), (320, 3072), (320, 3136), (320, 3200), (320, 3264), (384, 2368), (384, 2432),
    (384, 2496), (384, 2560), (384, 2624), (384, 2688), (448, 2112), (448, 2176), (448, 2240), (448, 2304),
    (512, 1856),
]  # fmt: skip


def test_the_release_has_97_buckets_of_which_the_first_33_are_the_published_ones():
    sizes = buckets.all_buckets(RELEASE)
    assert len(sizes) == 97
    assert sizes[:33] == PUBLISHED
    assert (1024, 1024) in sizes and (832, 1216) in sizes


def test_a_size_is_a_bucket_if_it_is_the_largest_of_its_side_that_fits_the_area():
    """Of all pairs of multiples of 64 between 256 and 4096: one side is the longest that keeps the area under 1024², or
    the longest allowed.
    """
    sides = range(256, 4097, 64)

    def longest(width):
        return max(height for height in sides if width * height <= 1024 * 1024)

    fitting = {(width, longest(width)) for width in sides if width * 256 <= 1024 * 1024}
    assert set(buckets.all_buckets(RELEASE)) == fitting | {(height, width) for width, height in fitting} | {
        (1024, 1024)
    }


def nearest(width, height, sizes):
    if (width, height) in sizes:
        return sizes.index((width, height))
    errors = [abs(w / h - width / height) for w, h in sizes]
    return errors.index(min(errors))


def test_every_image_takes_its_own_size_or_the_nearest_ratio():
    sizes = buckets.all_buckets(RELEASE)
    numbers = np.random.default_rng(1)
    widths, heights = numbers.integers(1, 5000, 3000), numbers.integers(1, 5000, 3000)
    widths[:97], heights[:97] = zip(*sizes, strict=True)
    chosen = buckets.choose_bucket(widths, heights, sizes)
    assert chosen.tolist() == [nearest(w, h, sizes) for w, h in zip(widths.tolist(), heights.tolist(), strict=True)]


def test_the_published_example_is_cut_by_16_px_and_conditioned_on_10():
    assert buckets.resized((1000, 1500), (832, 1216)) == (832, 1248)
    assert buckets.crop((1000, 1500), (832, 1216), "letterbox") == (0.0, 10.0)
    assert buckets.crop((1000, 1500), (832, 1216), "real") == (16.0, 0.0)
    assert buckets.time_ids((1000, 1500), (832, 1216), "letterbox") == [1500, 1000, 0, 10, 1216, 832]


def test_resize_covers_the_bucket_by_less_than_a_pixel_too_much_and_the_letterbox_is_centred():
    """In integers: one side fits exactly, the other is the ratio rounded half up; the letterbox offset is half of the
    space that a fitted image would leave.
    """
    numbers = np.random.default_rng(3)
    sizes = buckets.all_buckets(RELEASE)
    for width, height in numbers.integers(64, 6000, (2000, 2)).tolist():
        bucket = sizes[nearest(width, height, sizes)]
        wider = width * bucket[1] > bucket[0] * height
        if wider:
            expected = ((2 * width * bucket[1] + height) // (2 * height), bucket[1])
            letterbox = ((bucket[1] * width - bucket[0] * height) // (2 * width), 0)
        else:
            expected = (bucket[0], (2 * height * bucket[0] + width) // (2 * width))
            letterbox = (0, (bucket[0] * height - bucket[1] * width) // (2 * height))
        resized = buckets.resized((width, height), bucket)
        assert resized == expected and resized[0] >= bucket[0] and resized[1] >= bucket[1]
        assert buckets.crop((width, height), bucket, "letterbox") == letterbox
        assert buckets.crop((width, height), bucket, "real") == (
            (resized[1] - bucket[1]) // 2,
            (resized[0] - bucket[0]) // 2,
        )


@pytest.mark.parametrize("size", [(2176, 448), (4352, 896), (34, 7)])
def test_a_rounded_quotient_gives_the_letterbox_of_minus_one_that_sd_scripts_gave(size):
    """2176 / (2176 / 448) is 448.00000000000006 in floating point, and the offset is rounded down. The numbers are
    those of sd-scripts v0.8.3 itself.
    """
    sizes = buckets.all_buckets(RELEASE)
    bucket = sizes[nearest(*size, sizes)]
    assert buckets.crop(size, bucket, "letterbox") == (-1.0, 0.0)
    assert buckets.crop(size, bucket, "real") == (0.0, 0.0)


def test_halving_is_the_mean_of_four_pixels_and_the_crop_is_the_middle():
    """INTER_AREA by closed form, and 16 px cut at top and bottom, as in the published example."""
    picture = np.random.default_rng(4).integers(0, 256, (2496, 1664, 3), np.uint8)
    means = picture.reshape(1248, 2, 832, 2, 3).astype(np.int64).sum(axis=(1, 3))
    assert (buckets.resize_and_crop(picture, (832, 1216)) == ((means + 2) // 4)[16:1232]).all()


@pytest.mark.parametrize("size", [(1000, 1500), (1500, 1000), (17, 3000), (833, 1217), (832, 1216), (5000, 40)])
def test_a_fitted_picture_fills_its_bucket_and_keeps_its_centre(size):
    sizes = buckets.all_buckets(RELEASE)
    bucket = sizes[nearest(*size, sizes)]
    ramp = np.broadcast_to(np.linspace(0, 255, size[0])[None, :, None], (size[1], size[0], 3)).astype(np.uint8)
    fitted = buckets.resize_and_crop(ramp, bucket)
    assert fitted.shape == (bucket[1], bucket[0], 3)
    middle = fitted[bucket[1] // 2, bucket[0] // 2, 0]
    assert abs(int(middle) - 127) <= 8


def test_a_picture_of_the_buckets_size_is_not_touched():
    picture = np.random.default_rng(2).integers(0, 256, (1216, 832, 3), np.uint8)
    assert (buckets.resize_and_crop(picture, (832, 1216)) == picture).all()
