"""Measures how many images per second a core decodes, and what the release's images take on 2, 16 and 32 cores.

Run: `python benchmarks/decoding.py`. The images are drawn, the same in every run: noise of all frequencies, about as
hard to compress as a photograph, as WebP. Time is the processor's, so other work on the machine matters little. Reading
from the disk comes on top: the filter stage reads every image once.
"""

import io
import time

import click
import cv2
import numpy as np
from PIL import Image

from kohaku_delta.danbooru import image
from kohaku_delta.params import load

OCTAVES = range(2, 11)  # of the noise: 4 to 1,024 cells across
FALL = 0.6  # of its amplitude from one octave to the next


def noise_image(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in OCTAVES:
        cells = 1 << octave
        coarse = rng.normal(size=(cells * height // width, cells, 3)).astype(np.float32)
        pixels += 400 * FALL**octave * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@click.command()
@click.option("--images", default=100, show_default=True)
@click.option("--width", default=2048, show_default=True)
@click.option("--height", default=1536, show_default=True)
@click.option("--quality", default=90, show_default=True)
def main(images: int, width: int, height: int, quality: int) -> None:
    """Images decoded per second and core."""
    files = []
    for seed in range(images):
        file = io.BytesIO()
        noise_image(seed, width, height).save(file, "WEBP", quality=quality)
        files.append(file.getvalue())
    started = time.process_time()
    for data in files:
        image.decoded_size(data)
    rate = images / (time.process_time() - started)
    size = sum(map(len, files)) / images
    click.echo(f"{images} images of {width} × {height}, {size / 1000:.0f} kB each: {rate:.1f} images/s per core")
    published = load("params.yaml").published
    if published:
        posts = published.dataset.posts
        times = ", ".join(f"{posts / rate / cores / 3600:.1f} h on {cores}" for cores in (2, 16, 32))
        click.echo(f"{posts:,} such images: {posts / rate / 3600:.0f} core hours; {times} cores")


if __name__ == "__main__":
    main()
