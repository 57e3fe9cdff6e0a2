"""sd-mecha's own weighted sum of two files, with its defaults. Runs in an environment of its own, made by
checkpoint.py.
"""

import argparse
from pathlib import Path

import sd_mecha


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("a", type=Path)
    arguments.add_argument("b", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--threads", type=int, default=None)
    given = arguments.parse_args()
    summed = sd_mecha.weighted_sum(sd_mecha.model(given.a.resolve()), sd_mecha.model(given.b.resolve()), alpha=0.5)
    sd_mecha.merge(summed, output=given.out.resolve(), threads=given.threads)


if __name__ == "__main__":
    main()
