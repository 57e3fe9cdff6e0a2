"""A finished rebuild for the tests of the audit, made in a second: the real pipeline, formats and captions, with a
dozen posts, eight steps and a few tensors.

dvc.lock and the records are written here, by hand, from what DVC and the stages are said to write: the audit's own code
is not used. `lock` and `records` can be called again after a change: that is the careful forger, who hashes everything
anew.
"""

import hashlib
import json
import os
import posixpath
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from ruamel.yaml import YAML

from kohaku_delta import params
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, selection, tag_counts
from kohaku_delta.formats import parquet, safetensors_io
from kohaku_delta.preview import measurement_files, samples
from kohaku_delta.preview.measurement_files import Measurement
from kohaku_delta.provenance import import_closure
from kohaku_delta.report import dataset_files
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import checkpointing, journal, run_folders, run_inputs, schedule, tensor_fingerprints
from kohaku_delta.weights import bake, export_diffusers, lokr_format

ROOT = Path(__file__).resolve().parents[2]
DATABASE = ROOT / "data" / "danbooru2023.db"
STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
STEPS_BETWEEN_STATES = 4
SHAPES = {  # of the second factors, on the toy's layers
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lokr_w2": (48, 12),
    "lora_te1_text_model_encoder_layers_1_mlp_fc1.lokr_w2": (48, 12),
    "lora_unet_out_2.lokr_w2": (1, 6, 3, 3),
}
TOKENIZERS = {
    f"{name}_{part}": f"{name}/{file}"
    for name in ("tokenizer", "tokenizer_2")
    for part, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))
}
LOCK = ROOT / "requirements" / "cpu.txt"
RECORDS = json.loads((ROOT / "requirements" / "cpu.records.json").read_text())
COMPUTING = ("train", "preview", "milestones")
CODE = {
    name: import_closure.dumps(import_closure.describe_stage(ROOT / "stages" / f"{name}.py", LOCK))
    for name in STAGES
    if name != "code"
}


def loaded(path: Path):
    return yaml.load(path.read_text(), yaml.CSafeLoader)  # ten times as fast as the parser of the code under test


def dump(path: Path, content) -> None:
    path.write_text(yaml.dump(content, None, yaml.CSafeDumper, sort_keys=False))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(folder: Path) -> Path:
    """The recipe's folder, finished and locked."""
    build = folder / "build"
    build.mkdir(parents=True)
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (build / "code").mkdir()
    for name in STAGES:
        if name != "code":
            (build / "code" / f"{name}.json").write_text(CODE[name])
    (folder / "mirror").mkdir()
    (folder / "mirror" / "data-0004.tar").write_bytes(b"pictures" * 64)
    content = loaded(ROOT / "miniature" / "params.yaml")
    content["root"], content["supplied"] = os.path.relpath(ROOT, folder), "mirror"
    content["train"]["milestone_every"] = STEPS_BETWEEN_STATES
    content["schedule"] |= {"epochs": 1, "batch_size": 2, "micro_batches": 2, "lanes": 2}
    database = Database(DATABASE)
    content["selection"]["ranges"] = [{"from": int(database.post_ids()[-60]), "below": None, "draw": 60}]
    content["download"] |= {
        "mirror": "mirror",
        "inputs": {"database": _pin(folder, DATABASE), "tars": [_pin(folder, folder / "mirror" / "data-0004.tar")]}
        | {name: _pin(folder, ROOT / "data" / place) for name, place in TOKENIZERS.items()},
    }
    dump(folder / "params.yaml", content)
    recipe = params.load(folder / "params.yaml")
    listed = {
        name: [_listed(folder, pin) for pin in (pins if isinstance(pins, list) else [pins])]
        for name, pins in content["download"]["inputs"].items()
    }
    (build / "inputs.json").write_text(
        json.dumps(
            {"inputs": listed | {name: listed[name][0] for name in listed if name != "tars"}, "start": "merge"},
            sort_keys=True,
        )
    )

    selected = selection.select(database, recipe.selection)
    ids = selected["post_id"].to_numpy()
    trained = ids[captions.captionable(database, ids, recipe.caption)][:30]
    dropped = np.setdiff1d(ids, trained)
    parquet.write(selected, build / "selection.parquet")
    reasons = pa.array(["deleted"] * len(dropped))
    parquet.write(pa.table({"post_id": dropped, "reason": reasons}), build / "dropped.parquet")
    sides = pa.array([96 + 32 * (row % 3) for row in range(30)], pa.int32())
    parquet.write(
        pa.table(
            {
                "post_id": trained,
                "tar": ["data-0004.tar"] * 30,
                "width": sides,
                "height": pa.array([128] * 30, pa.int32()),
                "despite": pa.array([None] * 30, pa.string()),
            }
        ),
        build / "posts.parquet",
    )
    counts = tag_counts.TagCounter()
    captions.write_captions(database, trained, recipe.caption, build / "captions.parquet", counts)
    tag_counts.write_tag_counts(counts.artists(), build / "artists-kxl-delta.json")
    tag_counts.write_tag_counts(counts.characters(), build / "characters-kxl-delta.json")
    rows, buckets = schedule.build_schedule(parquet.read(build / "posts.parquet"), recipe.schedule)
    parquet.write(rows, build / "schedule.parquet")
    (build / "bucket.txt").write_text(schedule.bucket_lines(buckets))

    shutil.copyfile(ROOT / "data" / "checkpoints" / "gamma.safetensors", build / "delta-base.safetensors")
    with safetensors_io.open_file(build / "delta-base.safetensors") as file:
        _train(folder, recipe, rows, file.digest())
    _publish(folder, recipe)
    lock(folder)
    records(folder)
    return folder


def _publish(folder: Path, recipe) -> None:
    """What is made of dataset, journal and LoKr, as the stages make it; only pictures and losses are made up."""
    build = folder / "build"
    tokenizers = {
        name: tuple(ROOT / "data" / TOKENIZERS[f"{name}_{part}"] for part in ("vocab", "merges"))
        for name in ("tokenizer", "tokenizer_2")
    }
    write_statistics(folder)
    rows = journal.read_journal(build / "journal.parquet").rows
    (build / "curves.csv").write_text("".join(journal.curve_lines(rows)))
    files = {"base": build / "delta-base.safetensors", "final": build / "kohaku-xl-delta.safetensors"}
    bake.bake(files["base"], build / "delta-lokr.safetensors", recipe.bake, recipe.model.side, files["final"])
    export_diffusers.export(files["final"], tokenizers, recipe.model, build / "diffusers")
    generator, preview = np.random.default_rng(2), recipe.preview
    pictures = {
        model: list(generator.integers(0, 256, (len(preview.prompts), preview.height, preview.width, 3), np.uint8))
        for model in files
    }
    losses = {model: {"sdxl": loss, "training": loss / 2} for model, loss in (("base", 0.5), ("final", 0.25))}
    measured = {"posts": 3} | {model: {"loss": losses[model]} for model in losses}
    (build / "held-out.json").write_text(json.dumps(measured, indent=1) + "\n")
    (build / "preview.png").write_bytes(measurement_files.draw_sheet(preview, pictures, None, measured))
    named = {model: (path.stem, sha256(path.read_bytes())) for model, path in files.items()}
    samples.write_samples(build / "samples", preview, pictures, named)
    steps = [*range(0, len(rows), STEPS_BETWEEN_STATES), len(rows)]
    models = {
        step: Measurement(pictures["final" if step else "base"], losses["final" if step else "base"]) for step in steps
    }
    measurement_files.write_curve(build / "milestones.csv", models)
    measurement_files.write_grid(build / "milestones.png", preview.prompts, models)


def write_statistics(folder: Path) -> None:
    """dataset.json and its plots, of what lies there now."""
    build = folder / "build"
    source = {name: build / f"{name}.parquet" for name in ("selection", "posts", "dropped", "captions")}
    source |= {name: build / f"{name}-kxl-delta.json" for name in ("artists", "characters")}
    tokenizer = ClipTokenizer(*(ROOT / "data" / TOKENIZERS[f"tokenizer_{part}"] for part in ("vocab", "merges")))
    dataset_files.write_statistics(
        params.load(folder / "params.yaml"),
        Database(DATABASE),
        tokenizer,
        source | {"buckets": build / "bucket.txt"},
        build / "dataset.json",
        build / "statistics",
    )


def _pin(folder: Path, path: Path) -> dict:
    return {
        "url": f"file://{os.path.relpath(path, folder)}",
        "bytes": path.stat().st_size,
        "sha256": sha256(path.read_bytes()),
    }


def _listed(folder: Path, pin: dict) -> dict:
    return pin | {
        "pinned": "sha256",
        "path": os.path.relpath(folder / pin["url"].removeprefix("file://"), folder / "build"),
    }


def _train(folder: Path, recipe, rows: pa.Table, base: str, start: str | None = None) -> None:
    """A journal, its LoKr, and the states on its way: made up, and consistent. start: sha256 of the LoKr that it began
    with.
    """
    began = {"network_weights": start} if start else {}
    names = [
        f"lora_te1_text_model_encoder_layers_{layer}_mlp_fc1.lokr_w{number}" for layer in range(2) for number in (1, 2)
    ] + ["lora_unet_out_2.lokr_w1", "lora_unet_out_2.lokr_w2"]
    weights = {name: torch.zeros(SHAPES.get(name, (4, 4))) for name in names}
    honest, depends = (
        journal.Journal({"base": base, "parameters": run_inputs.result_parameters(recipe)} | began),
        {name: str(value) for name, value in run_inputs.result_parameters(recipe).items()} | began,
    )
    depends |= {f"code of {file}": digest for file, digest in json.loads(CODE["train"])["files"].items()}
    depends |= {
        name: sha256((folder / "build" / file).read_bytes())
        for name, file in (
            ("base", "delta-base.safetensors"),
            *((each, f"{each}.parquet") for each in ("posts", "captions", "schedule")),
        )
    }
    steps = int(rows["step"][-1].as_py()) + 1
    work = run_folders.run_folder(folder / "work", depends, steps, 0)
    for step in range(steps):
        batches = [row for row in rows.to_pylist() if row["step"] == step]
        for number, name in enumerate(names):
            if "layers_1_mlp_fc1.lokr_w2" not in name:
                weights[name] += (step + 1) * (number + 1) / 1000
        found = tensor_fingerprints.fingerprints(weights)
        row = {
            "step": step, "visits": journal.visits_digest(batches), "losses": [0.5 + step / 100] * len(batches),
            "lanes": [step + 1, step + 2],
            "gradient_norm": 1.0 + step, "learning_rate_unet": 0.5, "learning_rate_text": 0.25, "scale": 1.0,
            "weights": tensor_fingerprints.combine(found),
            "optimizer": tensor_fingerprints.combine({}), "tensors": tensor_fingerprints.short_fingerprints(found),
        }  # fmt: skip
        honest.append(row)
        if (step + 1) % STEPS_BETWEEN_STATES == 0:
            milestone = folder / "build" / "milestones" / f"delta-lokr-step{step + 1:08d}.safetensors"
            arrays = {name: tensor.numpy() for name, tensor in weights.items()}
            lokr_format.write_lokr(milestone, arrays, recipe, base)
        if (step + 1) % STEPS_BETWEEN_STATES == 0 or step + 1 == steps:
            tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
            checkpointing.save(work, step + 1, tensors, honest, 100, 100)
    written = lokr_format.write_lokr(
        folder / "build" / "delta-lokr.safetensors",
        {name: tensor.numpy() for name, tensor in weights.items()},
        recipe,
        base,
    )
    honest.lokr = written.digest
    honest.write(folder / "build" / "journal.parquet")


def declared(folder: Path, name: str) -> dict:
    """A stage of dvc.yaml with ${…} filled in."""
    values, stage = loaded(folder / "params.yaml"), STAGES[name]

    def filled(text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)

    outs = [each for kind in ("outs", "metrics", "plots") for each in stage.get(kind, [])]
    parameters = {}
    for key in stage["params"]:
        section, _, rest = key.partition(".")
        parameters[key] = values[section][rest] if rest else values[section]
    return {
        "cmd": filled(stage["cmd"]),
        "deps": [posixpath.normpath(filled(each)) for each in stage["deps"]],
        "outs": outs,
        "params": parameters,
    }


LEFT_OUT = {"__pycache__", "kohaku_delta.egg-info"}  # .dvcignore says so


def hashed(path: Path) -> dict:
    """md5 and size of a file, or of a folder as DVC counts them; and sha256s."""
    if not path.is_dir():
        data = path.read_bytes()
        return {"md5": hashlib.md5(data).hexdigest(), "size": len(data), "sha256": sha256(data), "files": None}
    files = {
        each.relative_to(path).as_posix(): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file() and not LEFT_OUT & {*each.parts}
    }
    listing = json.dumps(
        [{"md5": hashlib.md5(data).hexdigest(), "relpath": place} for place, data in sorted(files.items())]
    )
    shas = {place: sha256(data) for place, data in files.items()}
    return {
        "md5": hashlib.md5(listing.encode()).hexdigest() + ".dir", "size": sum(map(len, files.values())),
        "nfiles": len(files),
        "sha256": sha256("".join(f"{each}  {place}\n" for place, each in sorted(shas.items())).encode()), "files": shas,
    }  # fmt: skip


def lock(folder: Path) -> None:
    """dvc.lock of what lies there now."""
    stages = {}
    for name in STAGES:
        declaration = declared(folder, name)

        def place(path: str) -> dict:
            return {"path": path, "hash": "md5"} | {
                key: value for key, value in hashed(folder / path).items() if key in ("md5", "size", "nfiles")
            }

        stages[name] = {
            "cmd": declaration["cmd"],
            "deps": [place(path) for path in declaration["deps"]],
            "params": {"params.yaml": declaration["params"]},
            "outs": [place(path) for path in declaration["outs"]],
        }
    dump(folder / "dvc.lock", {"schema": "2.0", "stages": stages})


def records(folder: Path, **changed) -> None:
    """The records of the runs that dvc.lock tells of."""
    place = folder / "build" / "records"
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    for name, stage in loaded(folder / "dvc.lock")["stages"].items():
        inputs, outputs = {}, {}
        for dep in stage["deps"]:
            found = hashed(folder / dep["path"])
            inputs[dep["path"]] = {
                "before": found["sha256"],
                "after": found["sha256"],
                "md5": dep["md5"],
                "bytes": dep["size"],
            }
        for out in stage["outs"]:
            found = hashed(folder / out["path"])
            outputs[out["path"]] = {
                "sha256": found["sha256"],
                "md5": out["md5"],
                "bytes": out["size"],
                "files": found["files"],
            }
        parameters = stage["params"]["params.yaml"]
        code = json.loads(CODE[name])["libraries"] if name in CODE else {}
        libraries = {library: each["version"] for library, each in code.items()}
        content = {
            "format": "kohaku-delta record 2", "stage": name, "command": stage["cmd"], "inputs": inputs,
            "outputs": outputs,
            "parameters": parameters, "parameters_after": parameters, "revision": None,
            "libraries": libraries, "container": None,
            "loaded": {
                "records": {library: RECORDS[library] for library in libraries}, "changed": [], "others": {},
                "foreign": [], "startup": [], "variables": [], "files": 7, "bytes": 700,
            },
            "numerics": {"device": "cpu", "torch": libraries["torch"]} if name in COMPUTING else None,
            "confined": "audit hook and Landlock (version 7)", "changed_code": [],
            "host": {"processor": "one"},
            "times": {"began": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:00:01+00:00", "seconds": 1.0},
        }  # fmt: skip
        key = sha256(
            json.dumps(
                [stage["cmd"], {dep["path"]: dep["md5"] for dep in stage["deps"]}, parameters], sort_keys=True
            ).encode()
        )[:16]
        (place / f"{name}-{key}.json").write_text(json.dumps(content | changed))
