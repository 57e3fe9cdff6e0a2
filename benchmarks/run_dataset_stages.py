"""Runs what `dvc repro` runs: the stages select, filter and caption, one after another, in one process."""

import runpy
import sys
from pathlib import Path

STAGES = Path(__file__).resolve().parent.parent / "stages"


def main(params: str, collection: str, out: str) -> None:
    given = ["--params", params, "--database", f"{collection}/danbooru2023.db"]
    files = {name: f"{out}/{name}.parquet" for name in ("selection", "posts", "dropped", "captions")}
    options = {
        "select": ["--out", files["selection"]],
        "filter": [
            "--tars",
            f"{collection}/images",
            "--selection",
            files["selection"],
            "--out",
            files["posts"],
            "--dropped",
            files["dropped"],
        ],
        "caption": ["--posts", files["posts"], "--out", files["captions"]],
    }
    for stage, each in options.items():
        first = sys.path[0]
        runpy.run_path(str(STAGES / f"{stage}.py"))["main"](given + each, standalone_mode=False)
        sys.path[0] = first


if __name__ == "__main__":
    main(*sys.argv[1:])
