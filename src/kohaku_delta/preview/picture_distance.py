"""The distance of two pictures, with the same bits on every x86-64 processor.

Both are blurred slightly (Gaussian, σ = 2 px: an edge may be off by a pixel or two, figures stay distinct) and
converted to CIELAB, in OpenCV's integer arithmetic for uint8. The distance is the mean over pixels of CIE76's
ΔE = √(ΔL*² + Δa*² + Δb*²) (CIE 1976). Squares are integers, numpy's square root is correctly rounded, and math.fsum
rounds once.
"""

import math

import cv2
import numpy as np

SIGMA, KERNEL = 2.0, (13, 13)  # px; the kernel reaches 3 σ


def to_lab(picture: np.ndarray) -> np.ndarray:
    """The blurred picture in CIELAB as OpenCV stores it, int64 (H, W, 3): 255/100 · L*, a* + 128, b* + 128. picture:
    uint8 RGB (H, W, 3).
    """
    blurred = cv2.GaussianBlur(np.ascontiguousarray(picture), KERNEL, SIGMA, borderType=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB).astype(np.int64)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean ΔE of two uint8 RGB pictures of one size, 0 if equal."""
    light, red, yellow = np.moveaxis(to_lab(one) - to_lab(other), -1, 0)
    squares = 100 * 100 * light * light + 255 * 255 * (red * red + yellow * yellow)  # (255 ΔE)²
    return math.fsum(np.sqrt(squares.astype(np.float64)).ravel().tolist()) / (255 * squares.size)


def mean_distances(pictures: dict[str, list[np.ndarray]], references: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Distance of each picture to its prompt's reference: {name: {"mean": x, "prompt-0": y, …}} for each name of
    `pictures`, and for "flat", the references' mean colours.
    """
    measured = {}
    for name, drawn in {**pictures, "flat": [mean_color_picture(each) for each in references]}.items():
        distances = [distance(one, other) for one, other in zip(drawn, references, strict=True)]
        by_prompt = {f"prompt-{number}": each for number, each in enumerate(distances)}
        measured[name] = {"mean": math.fsum(distances) / len(distances), **by_prompt}
    return measured


def mean_color_picture(picture: np.ndarray) -> np.ndarray:
    """A picture of the same size in its mean colour: integer sums, rounded to the nearest level."""
    pixels = picture.shape[0] * picture.shape[1]
    mean = (2 * picture.astype(np.int64).sum(axis=(0, 1)) + pixels) // (2 * pixels)
    return np.broadcast_to(mean.astype(np.uint8), picture.shape).copy()
