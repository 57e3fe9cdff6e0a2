"""sd-mecha's weighted sum of two files, with its defaults, in the environment that benchmarks/checkpoint.py makes."""

import argparse
from pathlib import Path

import sd_mecha


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    summed = sd_mecha.weighted_sum(sd_mecha.model(options.a.resolve()), sd_mecha.model(options.b.resolve()), alpha=0.5)
    sd_mecha.merge(summed, output=options.out.resolve(), threads=options.threads)


if __name__ == "__main__":
    main()
