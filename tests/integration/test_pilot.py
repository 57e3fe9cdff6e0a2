"""A recipe of a few tars, as the pilot is one: what it does not name is not expected, what it names must be there, and
nothing is fetched that no stage reads.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from kohaku_delta import params
from kohaku_delta.danbooru import tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import selection
from kohaku_delta.preview import checkpoint_measurement

ROOT = Path(__file__).resolve().parents[2]
TARS = ("data-0004", "data-1004")
REVISION = "0123456789abcdef0123456789abcdef01234567"
yaml = YAML(typ="safe", pure=True)


@pytest.fixture
def recipe(tmp_path):
    """The miniature with two of its tars, from a published base; a function that writes it after a change."""
    content = yaml.load(
        (ROOT / "miniature" / "params.yaml").read_text().replace("file://../data", f"file://{ROOT}/data")
    )
    content |= {"root": str(ROOT), "supplied": "."}
    inputs = content["download"]["inputs"]
    inputs["tars"] = [pin for pin in inputs["tars"] if pin["url"][-13:-4] in TARS]
    inputs["delta_base"] = inputs["sdxl"]
    inputs |= {
        name: {"url": f"file://nowhere/{name}", "bytes": 7, "sha256": "0" * 64} for name in ("sdxl", "beta", "gamma")
    }
    content["merge"]["start"] = "published"
    content["download"]["mirror"] = str(tmp_path / "mirror")

    def write(change=lambda content: None):
        change(content)
        with open(tmp_path / "params.yaml", "w") as file:
            yaml.dump(content, file)
        return params.load(tmp_path / "params.yaml")

    return write


def stage(folder, name, **environment):
    command = [sys.executable, str(ROOT / "stages" / f"{name}.py")]
    variables = os.environ | {"PYTHONPATH": ""} | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables)


def column(path, name):
    return pq.read_table(path)[name].to_pylist()


def test_posts_of_tars_that_no_pin_names_are_dropped_and_held_out_posts_are_drawn_from_those_that_are(recipe, tmp_path):
    loaded, build = recipe(), tmp_path / "build"
    for name in ("download", "select", "filter"):
        done = stage(tmp_path, name)
        assert done.returncode == 0, done.stderr
    assert not {"sdxl", "beta", "gamma"} & yaml.load(build / "inputs.json")["inputs"].keys()
    selected = set(column(build / "selection.parquet", "post_id"))
    members: set[int] = set()
    for name in TARS:
        with tarfile.open(ROOT / "data" / "images" / f"{name}.tar") as tar:
            members |= {int(Path(member).stem) for member in tar.getnames() if Path(member).stem.isdigit()}
    trained = set(column(build / "posts.parquet", "post_id"))
    dropped = dict(zip(*(column(build / "dropped.parquet", name) for name in ("post_id", "reason")), strict=True))
    assert trained and trained <= selected & members and trained | dropped.keys() == selected
    elsewhere = {dropped[post] for post in selected - members if post % 1000 != 4}
    assert "missing from the tars" in elsewhere and elsewhere <= {
        "missing from the tars", "deleted", "banned", "hidden", "not an image",
    }  # fmt: skip

    database, chosen = (
        Database(ROOT / "data" / "danbooru2023.db"),
        pq.read_table(build / "selection.parquet")["post_id"],
    )
    files = {tars_number(name): ROOT / "data" / "images" / f"{name}.tar" for name in TARS}
    posts, reason = checkpoint_measurement.held_out_posts(loaded, database, files, chosen.to_numpy())
    held_out = set(posts["post_id"].to_pylist())
    assert reason is None and len(held_out) > loaded.preview.held_out / 2
    assert held_out <= members - selected
    assert not (build / "inputs.json").read_bytes().count(b"nowhere")


def tars_number(name: str) -> int:
    return int(name.removeprefix("data-"))


def test_with_every_main_tar_the_held_out_posts_are_those_of_the_whole_database():
    ids = Database(ROOT / "data" / "danbooru2023.db").post_ids()
    assert (tars.in_main_tars(ids, [4, 137, 512, 999, 1004, 2000]) == ids).all()
    assert set(tars.in_main_tars(ids, [137, 1004, 2000]) % 1000) == {137}
    assert len(selection.held_out(tars.in_main_tars(ids, [1004, 2000]), ids[:0], 1, 64)) == 0


def test_offline_a_tar_that_the_mirror_lacks_is_named_before_anything_is_written(recipe, tmp_path):
    url = f"hf://datasets/owner/name@{REVISION}/images/data-{{0000..0002}}.tar"
    recipe(lambda content: content["download"]["inputs"].update(tars=[{"url": url, "bytes": None, "sha256": None}]))
    images = tmp_path / "mirror" / "dataset" / "owner" / "name" / REVISION / "images"
    images.mkdir(parents=True)
    for number in (0, 2):
        (images / f"data-{number:04d}.tar").write_bytes(bytes(1024))
    done = stage(tmp_path, "download", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "data-0001.tar" in done.stderr and "HF_HUB_OFFLINE" in done.stderr
    assert not (tmp_path / "build" / "inputs.json").exists()


def test_a_tar_that_is_lost_after_the_download_is_named_by_the_next_stage(recipe, tmp_path):
    lost = tmp_path / "data-0004.tar"
    lost.write_bytes((ROOT / "data" / "images" / "data-0004.tar").read_bytes())
    recipe(
        lambda content: content["download"]["inputs"].update(
            tars=[{"url": f"file://{lost}", "bytes": None, "sha256": None}]
        )
    )
    assert stage(tmp_path, "download").returncode == 0 and stage(tmp_path, "select").returncode == 0
    lost.unlink()
    done = stage(tmp_path, "filter")
    assert done.returncode == 1 and "data-0004.tar" in done.stderr and "does not exist" in done.stderr
    assert not (tmp_path / "build" / "posts.parquet").exists()
