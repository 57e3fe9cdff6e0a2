"""A tiny training: a few posts of the miniature, a toy base, and a recipe of a few steps, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from ruamel.yaml import YAML

import tiny_sdxl
from kohaku_delta import params
from kohaku_delta.danbooru import tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, filtering
from kohaku_delta.formats import parquet
from kohaku_delta.hub import inputs_manifest, mirror
from kohaku_delta.training import schedule

ROOT = Path(__file__).resolve().parents[2]
OUTS = ("delta-lokr.safetensors", "journal.parquet", "curves.csv")
yaml = YAML(typ="safe", pure=True)


def write(
    folder: Path, posts: int, sections: dict[str, dict] | None = None, start: Path | None = None, **train
) -> Path:
    """Everything that `stages/train.py` reads, under folder/build, and params.yaml: two images per micro-batch, four
    micro-batches per step.

    `train` (of train or execution), and other `sections`: parameters that differ from the miniature's. start: a LoKr
    file to begin with.
    """
    content = yaml.load((ROOT / "miniature" / "params.yaml").read_text())
    content["schedule"] |= {"batch_size": 2, "micro_batches": 4, "lanes": 4}
    content["train"] |= {"warmup_steps": 0} | {
        name: value for name, value in train.items() if name not in params.Execution.model_fields
    }
    content["execution"] |= {"save_every": 1} | {
        name: value for name, value in train.items() if name in params.Execution.model_fields
    }
    for name, values in (sections or {}).items():
        content[name] |= values
    content["download"] = {
        "mirror": "mirror",
        "images": "all",
        "inputs": {
            "database": {"url": f"file://{ROOT}/data/danbooru2023.db", "bytes": None, "sha256": None},
            "tars": [
                {"url": f"file://{path}", "bytes": None, "sha256": None}
                for path in sorted((ROOT / "data" / "images").glob("*.tar"))
            ],
            **{
                f"tokenizer{second}_{kind}": {
                    "url": f"file://{ROOT}/data/tokenizer{second}/{file}",
                    "bytes": None,
                    "sha256": None,
                }
                for second in ("", "_2")
                for kind, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))
            },
        },
    }
    if start:
        content["download"]["inputs"]["network_weights"] = {"url": f"file://{start}", "bytes": None, "sha256": None}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(content, file)
    recipe, build = params.load(folder / "params.yaml"), folder / "build"
    inputs_manifest.write(
        mirror.resolve_inputs(recipe.download, folder), folder, recipe.merge.start, build / "inputs.json"
    )
    database = Database(ROOT / "data" / "danbooru2023.db")
    chosen, _ = filtering.filter_posts(
        database,
        tars.tars_in(ROOT / "data" / "images"),
        database.post_ids()[-2 * posts :],
        recipe.filter,
        recipe.caption,
    )
    chosen = chosen.slice(0, posts)
    parquet.write(chosen, build / "posts.parquet")
    parquet.write(
        captions.caption_posts(database, chosen["post_id"].to_numpy(), recipe.caption), build / "captions.parquet"
    )
    parquet.write(schedule.build_schedule(chosen, recipe.schedule)[0], build / "schedule.parquet")
    tiny_sdxl.write(build / "delta-base.safetensors", 1)
    return folder


def command(ranks: int) -> list[str]:
    return [sys.executable, str(ROOT / "stages" / "train.py"), "--ranks", str(ranks)]


def run(folder: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run the training in `folder`; its output is in .stdout and .stderr."""
    return subprocess.run(
        command(ranks), cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )


def outs(folder: Path) -> dict[str, bytes]:
    """Name → bytes of every file that the stage wrote."""
    milestones = sorted((folder / "build" / "milestones").iterdir())
    return {path.name: path.read_bytes() for path in [*(folder / "build" / name for name in OUTS), *milestones]}


def journal(folder: Path) -> pa.Table:
    return parquet.read(folder / "build" / "journal.parquet")
