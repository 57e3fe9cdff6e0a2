"""The three stages as a user runs them by hand, on a database and tars of their own."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from danbooru_factory import ARTIST, CHARACTER, GENERAL, picture, write_database, write_tar

ROOT = Path(__file__).resolve().parents[2]


def run(stage, *options, ok=True):
    result = subprocess.run(
        [sys.executable, ROOT / "stages" / f"{stage}.py", *map(str, options)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in result.stderr
    assert (result.returncode == 0) == ok, result.stderr
    return result.stdout if ok else result.stderr


@pytest.fixture
def place(tmp_path):
    posts = [{"id": post} for post in (1001, 2001, 3_000_001, 4_000_001, 5_000_001, 7_100_001)] + [
        {"id": 6_000_001, "is_deleted": 1}
    ]
    pairs = [(post["id"], tag) for post in posts for tag in (1, 2, 3)]
    write_database(
        tmp_path / "other.db",
        posts,
        [(1, "long_hair", GENERAL), (2, "hatsune_miku", CHARACTER), (3, "an_artist", ARTIST)],
        pairs,
    )
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "data-0001.tar", [(f"{post['id']}.webp", picture()) for post in posts[:6]])
    text = (ROOT / "params.yaml").read_text().replace("draw: 1000000", "draw: 3")
    (tmp_path / "params.yaml").write_text(text)
    return tmp_path


def chain(place, build, inputs=False):
    params = ("--params", place / "params.yaml")
    database = ("--inputs", place / "inputs.json") if inputs else ("--database", place / "other.db")
    tars = (
        ("--inputs", place / "inputs.json") if inputs else ("--database", place / "other.db", "--tars", place / "tars")
    )
    lines = run("select", *params, *database, "--out", build / "selection.parquet")
    lines += run(
        "filter",
        *params,
        *tars,
        "--selection",
        build / "selection.parquet",
        "--out",
        build / "posts.parquet",
        "--dropped",
        build / "dropped.parquet",
    )
    lines += run("caption", *params, *database, "--posts", build / "posts.parquet", "--out", build / "captions.parquet")
    return lines.splitlines(), {path.name: path.read_bytes() for path in build.iterdir()}


def test_three_stages_run_by_hand_and_from_inputs_json_with_the_same_bytes(place):
    lines, files = chain(place, place / "a")
    assert [line.split(":")[0] for line in lines] == ["select", "filter", "caption"]
    assert sorted(files) == [
        "artists-kxl-delta.json",
        "captions.parquet",
        "characters-kxl-delta.json",
        "dropped.parquet",
        "posts.parquet",
        "selection.parquet",
    ]
    assert json.loads(files["artists-kxl-delta.json"]).keys() == {"an artist"}

    def entry(path):
        return {
            "path": str(path),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "url": "",
        }

    entries = {"database": entry(place / "other.db"), "tars": [entry(path) for path in (place / "tars").iterdir()]}
    (place / "inputs.json").write_text(json.dumps({"inputs": entries}))
    assert chain(place, place / "b", inputs=True)[1] == files


def test_bad_input_is_a_sentence_and_leaves_nothing_behind(place):
    params, out = ("--params", place / "params.yaml"), ("--out", place / "out.parquet")
    (place / "text.db").write_text("hello " * 1000)
    assert "is not an SQLite database" in run("select", *params, "--database", place / "text.db", *out, ok=False)
    assert "does not exist" in run("select", *params, "--database", place / "none.db", *out, ok=False)
    assert "does not exist" in run("select", *params, "--inputs", place / "none.json", *out, ok=False)
    (place / "tars" / "data-0001.tar").unlink()
    run("select", *params, "--database", place / "other.db", "--out", place / "selection.parquet")
    options = (
        "--database",
        place / "other.db",
        "--tars",
        place / "tars",
        "--selection",
        place / "selection.parquet",
        "--dropped",
        place / "dropped.parquet",
    )
    assert "data-0001.tar" in run("filter", *params, *options, *out, ok=False)
    assert not {"out.parquet", "dropped.parquet"} & {path.name for path in place.iterdir()}
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("stage", ["select", "filter", "caption"])
def test_stages_of_the_dataset_do_not_load_torch(stage):
    code = (
        f"import runpy, sys; sys.argv = ['x']; runpy.run_path('stages/{stage}.py'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
