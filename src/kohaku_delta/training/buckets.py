"""Aspect-ratio buckets: an image's bucket, resize, crop and size conditioning, from its size and the recipe alone.

The geometry is that of sd-scripts v0.8.3. Sizes are (width, height) in pixels.
"""

import math

import numpy as np

from kohaku_delta.params import Schedule


def all_buckets(parameters: Schedule) -> list[tuple[int, int]]:
    """All buckets, ascending, as sd-scripts' make_bucket_resolutions: 97 for 1024², sides 256 … 4096, step 64."""
    area, step = parameters.area, parameters.side_step
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(parameters.min_side, parameters.max_side + 1, step):
        height = min(parameters.max_side, area // width // step * step)
        if height >= parameters.min_side:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_bucket(widths: np.ndarray, heights: np.ndarray, sizes: list[tuple[int, int]]) -> np.ndarray:
    """Index into `sizes` for each of n images, int32 (n,): its own size if that is a bucket, else the nearest ratio.

    The first bucket wins a tie. widths, heights: integer arrays (n,).
    """
    ratios = np.array([width / height for width, height in sizes])
    images = np.stack([np.asarray(widths, np.int64), np.asarray(heights, np.int64)], axis=1)
    distinct, inverse = np.unique(images, axis=0, return_inverse=True)
    chosen = np.empty(len(distinct), np.int32)
    for start in range(0, len(distinct), 1 << 16):  # in parts, because of the (sizes, images) table of distances
        part = distinct[start : start + (1 << 16)]
        chosen[start : start + len(part)] = np.abs(ratios - (part[:, 0] / part[:, 1])[:, None]).argmin(axis=1)
    exact = {size: index for index, size in enumerate(sizes)}
    for index, (width, height) in enumerate(distinct.tolist()):
        chosen[index] = exact.get((width, height), chosen[index])
    return chosen[inverse.reshape(-1)]


def resized(image: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the image's aspect ratio that covers the bucket, rounded half up."""
    width, height = image
    scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def resize_and_crop(pixels: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 → (bucket height, bucket width, 3) uint8: INTER_AREA to cover the bucket, then centre crop."""
    import cv2

    cv2.setNumThreads(1)
    size = resized((pixels.shape[1], pixels.shape[0]), bucket)
    if size != (pixels.shape[1], pixels.shape[0]):
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    left, top = ((size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2)
    return pixels[max(0, top) : max(0, top) + bucket[1], max(0, left) : max(0, left) + bucket[0]]


def crop(image: tuple[int, int], bucket: tuple[int, int], conditioning: str) -> tuple[float, float]:
    """The crop (top, left) that the model is conditioned on.

    "letterbox" is the release's quirk: the offset of the image inside the bucket as if it had been fitted, not cropped:
    (0, 10) for 1000×1500 in 832×1216, although 16 px are cut off at top and bottom. "real" is the actual crop.
    """
    if conditioning == "real":
        size = resized(image, bucket)
        return float((size[1] - bucket[1]) // 2), float((size[0] - bucket[0]) // 2)
    ratio = image[0] / image[1]
    if bucket[0] / bucket[1] > ratio:
        return 0.0, float((bucket[0] - bucket[1] * ratio) // 2)
    return float((bucket[1] - bucket[0] / ratio) // 2), 0.0


def time_ids(image: tuple[int, int], bucket: tuple[int, int], conditioning: str) -> list[float]:
    """SDXL's six size conditions: original (h, w), crop (top, left), target (h, w)."""
    return [float(image[1]), float(image[0]), *crop(image, bucket, conditioning), float(bucket[1]), float(bucket[0])]
