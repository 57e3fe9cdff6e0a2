"""How fast outputs are hashed, against sha256sum and md5sum: one file (an SDXL checkpoint has 6.9 GB) and two at once.
Run `make bench-audit`; --help shows the size.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import click

from kohaku_delta.formats import hashing


def timed(function) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


@click.command()
@click.option("--gib", type=float, default=6.46, show_default=True, help="Size of the file.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default="work/bench", show_default=True)
def main(gib: float, rounds: int, folder: Path) -> None:
    """The ways alternate, so other load hits all of them; the best of the rounds counts."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "a.bin", folder / "b.bin"]
    size = int(gib * (1 << 30))
    for path in paths:
        with open(path, "wb") as file:
            for start in range(0, size, 64 << 20):
                file.write(os.urandom(min(64 << 20, size - start)))
    ways = {
        "sha256sum": lambda: subprocess.run(["sha256sum", paths[0]], check=True, capture_output=True),
        "md5sum": lambda: subprocess.run(["md5sum", paths[0]], check=True, capture_output=True),
        "ours, sha256": lambda: hashing.digest_path(paths[0], md5=False),
        "ours, sha256 and md5": lambda: hashing.digest_path(paths[0]),
        "sha256sum of both": lambda: subprocess.run(["sha256sum", *paths], check=True, capture_output=True),
        "ours, sha256 of both": lambda: hashing.digest_paths(paths, md5=False),
        "ours, sha256 and md5 of both": lambda: hashing.digest_paths(paths),
    }
    seconds = {name: [] for name in ways}
    try:
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way))
    finally:
        for path in paths:
            path.unlink()
    for name, each in seconds.items():
        count = 2 if "both" in name else 1
        click.echo(f"{name:30} {min(each):7.2f} s  {count * size / min(each) / 1e6:7.0f} MB/s")


if __name__ == "__main__":
    main()
