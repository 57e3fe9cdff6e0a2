"""A finished build in a few kilobytes: the miniature's recipe with outputs that nobody computed, and its dvc.lock."""

import hashlib
import io
import json
from pathlib import Path

from PIL import Image
from ruamel.yaml import YAML

from kohaku_delta import paths
from kohaku_delta.provenance import dvc_lock, dvc_yaml, stage_record

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("buckets", "names", "posts", "ratings", "tokens", "years")
TARS = ("0000", "1137", "2000")  # of the release's 2,001 tars, these are listed
yaml = YAML(typ="safe", pure=True)
yaml.default_flow_style = False
yaml.representer.ignore_aliases = lambda _: True  # DVC writes none

DATASET = {
    "drawn": 12,
    "selected": 11,
    "trained": 9,
    "dropped": {"deleted": 1, "hidden": 1},
    "despite": {},
    "micro_batches": 3,
    "steps": 5,
    "buckets": 2,
    "ratings": {"safe": 5, "nsfw": 4},
    "quality": {"masterpiece": 9},
    "tokens": {"median": 5, "longest": 9, "over_225": 0},
    "published": "not compared: this recipe has no published figures",
}


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "#8090a0").save(file, "png")
    return file.getvalue()


def make(place: Path, params: dict | None = None, dataset: dict = DATASET, texts: dict[str, str] | None = None) -> Path:
    """A recipe's folder with its build. `params`: another recipe; `texts`: other content for files of build/."""
    params = params or recipe()
    weights = ("delta-base.safetensors", "delta-lokr.safetensors", "kohaku-xl-delta.safetensors")
    losses = {name: {"loss": {"sdxl": loss, "training": loss}} for name, loss in (("base", 0.5), ("final", 0.25))}
    steps = [
        f"{step},{0.5 / (step + 1)},{0.1 * step},{0.001 * min(step, 4)},{0.0002 * min(step, 4)}" for step in range(5)
    ]
    content: dict[str, bytes | str] = {
        **{f"code/{stage}.json": stage for stage in yaml.load((ROOT / "dvc.yaml").read_text())["stages"]},
        **{name: name.encode() * 20 for name in (*weights, "captions.parquet", "diffusers/model_index.json")},
        **{f"{name}.parquet": name for name in ("selection", "posts", "dropped", "schedule", "journal")},
        **{f"{name}-kxl-delta.json": "{}" for name in ("artists", "characters")},
        **{f"statistics/{name}.png": png(90, 60) for name in PICTURES},
        "preview.png": png(120, 60),
        "samples/final-00.png": png(30, 30),
        "milestones.png": png(180, 60),
        "milestones.csv": "step,held_out_loss,held_out_loss_training\n0,0.5,0.5\n2,0.375,0.375\n5,0.25,0.25\n",
        "milestones/delta-lokr-step00000002.safetensors": "a LoKr",
        "inputs.json": json.dumps({"inputs": inputs(params)}),
        "dataset.json": json.dumps(dataset),
        "held-out.json": json.dumps({"posts": 3, **losses}),
        "bucket.txt": "bucket 0: resolution (64, 64), count: 4\nbucket 1: resolution (64, 96), count: 5\n",
        "curves.csv": "\n".join(["step,loss,gradient_norm,learning_rate_unet,learning_rate_text", *steps]) + "\n",
        **(texts or {}),
    }
    for name, data in content.items():
        path = place / "build" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    (place / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    write_params(place, params)
    lock(place, params)
    return place


def write_params(place: Path, params: dict) -> None:
    with open(place / "params.yaml", "w") as file:
        yaml.dump(params, file)


def recipe() -> dict:
    """The miniature's, with the absolute path of the repository."""
    return yaml.load((ROOT / "miniature" / "params.yaml").read_text()) | {"root": str(ROOT)}


def inputs(params: dict) -> dict:
    """As the download stage lists them: what a pin leaves open is filled in."""

    def entry(pin: dict) -> dict:
        sha256, known = hashlib.sha256(pin["url"].encode()).hexdigest(), pin["sha256"] or ""
        return {"path": "x", "url": pin["url"], "bytes": pin["bytes"] or 7, "sha256": known + sha256[len(known) :]}

    def expand(pin: dict) -> list[dict]:
        span = "{0000..2000}"
        return [pin | {"url": pin["url"].replace(span, tar)} for tar in TARS] if span in pin["url"] else [pin]

    return {
        name: [entry(each) for pin in pins for each in expand(pin)] if isinstance(pins, list) else entry(pins)
        for name, pins in params["download"]["inputs"].items()
    }


def lock(place: Path, params: dict, leave_out: tuple[str, ...] = ()) -> None:
    """Writes dvc.lock as DVC would for the files that are there, without the stages of `leave_out`."""
    stages = {
        name: {
            "cmd": stage.command,
            "params": {"params.yaml": dvc_yaml.parameters(params, stage.params)},
            "outs": [out(place, path) for path in stage.outs],
        }
        for name, stage in dvc_yaml.stage_declarations(place).items()
        if name not in leave_out
    }
    with open(place / "dvc.lock", "w") as file:
        yaml.dump({"schema": "2.0", "stages": stages}, file)


def out(place: Path, path: str) -> dict:
    if (place / path).is_dir():
        sizes = [file.stat().st_size for file in (place / path).rglob("*") if file.is_file()]
        return {"path": path, "hash": "md5", "md5": "0" * 32 + ".dir", "size": sum(sizes), "nfiles": len(sizes)}
    content = (place / path).read_bytes()
    return {"path": path, "hash": "md5", "md5": hashlib.md5(content).hexdigest(), "size": len(content)}


def record_path(place: Path, stage: str) -> Path:
    """Where the record lies that dvc.lock names."""
    key = dvc_lock.read_lock(place / "dvc.lock")[stage].key()
    return place / paths.RECORDS / stage_record.record_filename(stage, key)


def record(
    place: Path,
    stage: str,
    seconds: float = 1.5,
    processor: str = "any",
    container: str | None = None,
    dirty: bool = False,
    md5: str | None = None,
) -> None:
    """Writes the record of a stage's run. `md5`: of other outputs than those of dvc.lock."""
    outs = dvc_lock.read_lock(place / "dvc.lock")[stage].outs
    outputs = {
        each.path: {"sha256": "0" * 64, "md5": md5 or each.md5, "bytes": each.size, "files": None} for each in outs
    }
    content = {
        "format": "kohaku-delta record 1",
        "stage": stage,
        "command": "x",
        "inputs": {},
        "outputs": outputs,
        "parameters": {},
        "parameters_after": {},
        "changed_code": [],
        "revision": {"commit": "ab" * 20, "dirty": dirty},
        "libraries": {},
        "container": container,
        "numerics": None,
        "confined": None,
        "host": {"processor": processor},
        "times": {"began": "", "ended": "", "seconds": seconds},
    }
    path = record_path(place, stage)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
