"""A finished build in a few kilobytes: the miniature's recipe, outputs that were never computed, and the lock that DVC
would have written for them.
"""

import hashlib
import io
import json
from pathlib import Path

from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("buckets", "names", "posts", "ratings", "tokens", "years")
yaml = YAML(typ="safe", pure=True)
yaml.default_flow_style = False
yaml.representer.ignore_aliases = lambda _: True  # DVC writes none

DATASET = {
    "drawn": 12, "selected": 11, "trained": 9, "dropped": {"deleted": 1, "hidden": 1}, "despite": {},
    "micro_batches": 3, "steps": 5, "buckets": 2, "ratings": {"safe": 5, "nsfw": 4}, "quality": {"masterpiece": 9},
    "tokens": {"median": 5, "longest": 9, "over_225": 0},
    "published": "not compared: this recipe has no published figures",
}  # fmt: skip


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "#8090a0").save(file, "png")
    return file.getvalue()


def make(place: Path, params: dict | None = None, dataset: dict = DATASET, texts: dict[str, str] | None = None) -> Path:
    """A recipe's folder with its build. `params`: another recipe; `texts`: outputs in build/ with other content."""
    build = place / "build"
    params = params or recipe()
    (build / "statistics").mkdir(parents=True)
    (build / "diffusers").mkdir()
    (build / "code").mkdir()
    for stage in yaml.load((ROOT / "dvc.yaml").read_text())["stages"]:
        (build / "code" / f"{stage}.json").write_text(stage)
    (place / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with open(place / "params.yaml", "w") as file:
        yaml.dump(params, file)
    for name in (
        "delta-base.safetensors",
        "delta-lokr.safetensors",
        "kohaku-xl-delta.safetensors",
        "captions.parquet",
        "diffusers/model_index.json",
    ):
        (build / name).write_bytes(name.encode() * 20)
    for name in ("selection", "posts", "dropped", "schedule", "journal"):
        (build / f"{name}.parquet").write_bytes(name.encode())
    for name in ("artists", "characters"):
        (build / f"{name}-kxl-delta.json").write_text("{}")
    for name in PICTURES:
        (build / "statistics" / f"{name}.png").write_bytes(png(90, 60))
    (build / "preview.png").write_bytes(png(120, 60))
    (build / "inputs.json").write_text(json.dumps({"inputs": inputs(params)}))
    (build / "dataset.json").write_text(json.dumps(dataset))
    (build / "held-out.json").write_text(
        json.dumps(
            {
                "posts": 3,
                "base": {"loss": {"sdxl": 0.5, "training": 0.5}},
                "final": {"loss": {"sdxl": 0.25, "training": 0.25}},
            }
        )
    )
    (build / "bucket.txt").write_text(
        "bucket 0: resolution (64, 64), count: 4\nbucket 1: resolution (64, 96), count: 5\n"
    )
    rows = [
        f"{step},{0.5 / (step + 1)},{0.1 * step},{0.001 * min(step, 4)},{0.0002 * min(step, 4)}" for step in range(5)
    ]
    (build / "curves.csv").write_text(
        "\n".join(["step,loss,gradient_norm,learning_rate_unet,learning_rate_text", *rows]) + "\n"
    )
    for name, text in (texts or {}).items():
        (build / name).write_text(text)
    lock(place, params)
    return place


def recipe() -> dict:
    """The miniature's, with the repository's place in full."""
    return yaml.load((ROOT / "miniature" / "params.yaml").read_text()) | {"root": str(ROOT)}


def inputs(params: dict) -> dict:
    """As the download stage lists them: what a pin leaves open is filled in."""

    def entry(pin: dict) -> dict:
        whole = hashlib.sha256(pin["url"].encode()).hexdigest()
        return {
            "path": "x",
            "url": pin["url"],
            "bytes": pin["bytes"] or 7,
            "sha256": (pin["sha256"] or "") + whole[len(pin["sha256"] or "") :],
        }

    def some(pin: dict) -> list[dict]:
        """Of the release's 2,001 tars, three."""
        return (
            [pin | {"url": pin["url"].replace("{0000..2000}", number)} for number in ("0000", "1137", "2000")]
            if "{0000..2000}" in pin["url"]
            else [pin]
        )

    return {
        name: [entry(each) for pin in pins for each in some(pin)] if isinstance(pins, list) else entry(pins)
        for name, pins in params["download"]["inputs"].items()
    }


def lock(place: Path, params: dict, leave_out: tuple[str, ...] = ()) -> None:
    """Writes dvc.lock as DVC would, for the files that exist; without the stages of `leave_out`."""
    stages = {}
    for name, stage in yaml.load((place / "dvc.yaml").read_text())["stages"].items():
        values = {}
        for key in stage["params"]:
            value = params
            for part in key.split("."):
                value = value[part]
            values[key] = value
        paths = stage.get("outs", []) + stage.get("metrics", []) + stage.get("plots", [])
        if name not in leave_out:
            stages[name] = {
                "cmd": stage["cmd"],
                "params": {"params.yaml": values},
                "outs": [out(place, path) for path in paths],
            }
    with open(place / "dvc.lock", "w") as file:
        yaml.dump({"schema": "2.0", "stages": stages}, file)


def out(place: Path, path: str) -> dict:
    files = [each for each in (place / path).rglob("*") if each.is_file()]
    if (place / path).is_dir():
        return {
            "path": path,
            "hash": "md5",
            "md5": "0" * 32 + ".dir",
            "size": sum(each.stat().st_size for each in files),
            "nfiles": len(files),
        }
    content = (place / path).read_bytes()
    return {"path": path, "hash": "md5", "md5": hashlib.md5(content).hexdigest(), "size": len(content)}
