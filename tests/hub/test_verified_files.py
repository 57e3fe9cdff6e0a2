"""An input that was edited after its download is noticed when it is opened, and one that was not is not read again."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest, mirror, verified_files
from kohaku_delta.params import Download, Pin

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "miniature" / "build"
DATA = b"a small input"


@pytest.fixture
def place(tmp_path):
    """A folder with an unpinned database and two tars, downloaded."""
    for name in ("danbooru2023.db", "data-0001.tar", "data-0002.tar"):
        (tmp_path / name).write_bytes(DATA)
    download(tmp_path)
    return tmp_path


def download(folder):
    pins = {
        name: Pin(url=f"file://{name}", bytes=None, sha256=None)
        for name in ("danbooru2023.db", "data-0001.tar", "data-0002.tar")
    }
    recipe = Download(
        mirror="m",
        images="all",
        inputs={"database": pins["danbooru2023.db"], "tars": [pins["data-0001.tar"], pins["data-0002.tar"]]},
    )
    inputs_manifest.write(mirror.resolve_inputs(recipe, folder), folder, "merge", folder / "build" / "inputs.json")


def edit(path, data=b"another input", keep_time=False):
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_edit_in_place_is_refused_even_with_the_old_size_and_the_old_time(place, keep_time):
    edit(place / "danbooru2023.db", keep_time=keep_time)
    with pytest.raises(
        UserError, match=r"danbooru2023.db was edited or replaced.*Put the file back.*download.inputs.database"
    ):
        inputs_manifest.path(place / "build" / "inputs.json", "database")


def test_a_file_that_is_replaced_by_an_older_one_of_the_same_size_is_refused(place):
    (place / "old").write_bytes(b"another input")
    os.utime(place / "old", (1e9, 1e9))
    os.replace(place / "old", place / "data-0002.tar")
    with pytest.raises(UserError, match="data-0002.tar was edited or replaced"):
        inputs_manifest.paths(place / "build" / "inputs.json", "tars")


def test_a_file_that_is_put_back_is_accepted_again(place):
    edit(place / "danbooru2023.db")
    edit(place / "danbooru2023.db", DATA)
    assert inputs_manifest.path(place / "build" / "inputs.json", "database") == place / "danbooru2023.db"


def test_an_edit_during_the_download_is_not_taken_for_what_was_hashed(place, monkeypatch):
    def hashed(path, advance):
        edit(Path(path))
        return "0" * 64

    monkeypatch.setattr(verified_files, "hash_file", hashed)
    with pytest.raises(UserError, match="was changed while it was hashed"):
        verified_files.hash_with_stamp(place / "danbooru2023.db")


def test_files_that_nobody_touched_are_not_read_again(place, monkeypatch):
    read = []
    monkeypatch.setattr(verified_files, "hash_file", lambda path, advance: read.append(path))
    inputs_manifest.paths(place / "build" / "inputs.json", "tars")
    assert read == []


def test_a_file_with_a_new_time_is_read_once_and_no_more(place, monkeypatch):
    time.sleep(verified_files.TICK)
    (place / "data-0001.tar").touch()
    hashed, read = verified_files.hash_file, []
    monkeypatch.setattr(
        verified_files, "hash_file", lambda path, advance: (read.append(path.name), hashed(path, advance))[1]
    )
    for _ in range(2):
        inputs_manifest.paths(place / "build" / "inputs.json", "tars")
    assert read == ["data-0001.tar"]


def test_of_several_ranks_that_find_a_new_time_one_reads_the_file(place, monkeypatch):
    time.sleep(verified_files.TICK)
    (place / "data-0001.tar").touch()
    hashed, read = verified_files.hash_file, []

    def slowly(path, advance):
        read.append(path.name)
        time.sleep(0.2)
        return hashed(path, advance)

    monkeypatch.setattr(verified_files, "hash_file", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: inputs_manifest.paths(place / "build" / "inputs.json", "tars"), range(4)))
    assert read == ["data-0001.tar"] and found == [found[0]] * 4


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"danbooru2023.db": 5}', '{"../danbooru2023.db": {"sha256": "0"}}']
)
def test_without_stamps_the_file_is_hashed_and_the_bytes_decide(place, content):
    """As in a clone to which DVC brought inputs.json from its cache."""
    kept = verified_files.stamps_path(place / "build" / "inputs.json")
    kept.unlink() if content is None else kept.write_text(content)
    assert inputs_manifest.path(place / "build" / "inputs.json", "database") == place / "danbooru2023.db"
    kept.unlink()
    edit(place / "danbooru2023.db")
    with pytest.raises(UserError, match="was edited or replaced"):
        inputs_manifest.path(place / "build" / "inputs.json", "database")


def test_stamps_that_cannot_be_kept_do_no_harm(place, monkeypatch):
    def refused(*arguments):
        raise PermissionError

    verified_files.stamps_path(place / "build" / "inputs.json").unlink()
    monkeypatch.setattr(verified_files.atomic_files, "atomic_write", refused)
    assert inputs_manifest.path(place / "build" / "inputs.json", "database") == place / "danbooru2023.db"


def test_a_sparse_tar_that_changed_is_sent_to_the_download_stage(place):
    listed = place / "build" / "inputs.json"
    content = json.loads(listed.read_text())
    content["inputs"]["tars"][0] |= {"pinned": "members", "url": "hf://datasets/a/b@0/data-0001.tar"}
    listed.write_text(json.dumps(content))
    inputs_manifest.paths(listed, "tars")
    edit(place / "data-0001.tar")
    with pytest.raises(UserError, match="data-0001.tar was changed.*Run the download stage again"):
        inputs_manifest.paths(listed, "tars")


def test_inputs_json_and_what_depends_on_it_know_no_time(place):
    before = (place / "build" / "inputs.json").read_bytes()
    (place / "danbooru2023.db").touch()
    download(place)
    assert (place / "build" / "inputs.json").read_bytes() == before


# stage → an input that it opens
OPENED = {
    "select": "danbooru2023.db", "filter": "images/data-1004.tar", "caption": "danbooru2023.db",
    "statistics": "tokenizer/vocab.json", "merge": "checkpoints/beta.safetensors",
    "train": "images/data-0004.tar", "export": "tokenizer_2/merges.txt", "preview": "references/reference-03.png",
}  # fmt: skip
QUICK = ("select", "filter", "caption")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A copy of the built miniature, with its inputs, beside this code."""
    if not (BUILD / "kohaku-xl-delta.safetensors").is_file():
        pytest.skip("the miniature is not built here: run `make repro` first")
    folder = tmp_path_factory.mktemp("edited")
    shutil.copytree(ROOT / "data", folder / "data")
    shutil.copytree(
        BUILD, folder / "miniature" / "build", ignore=shutil.ignore_patterns("records", "diffusers", "*.html")
    )
    (folder / "miniature" / "params.yaml").write_text(
        (ROOT / "miniature" / "params.yaml").read_text().replace("root: .. ", f"root: {ROOT} ")
    )
    subprocess.run([sys.executable, str(ROOT / "stages" / "code.py")], cwd=folder / "miniature", check=True)
    return folder


@pytest.mark.parametrize(
    "stage", [stage if stage in QUICK else pytest.param(stage, marks=pytest.mark.slow) for stage in OPENED]
)
def test_a_stage_refuses_an_input_that_was_edited(miniature, stage):
    path = miniature / "data" / OPENED[stage]
    data = path.read_bytes()
    edit(path, data[:-1] + bytes([data[-1] ^ 1]))
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "stages" / f"{stage}.py")],
            cwd=miniature / "miniature",
            capture_output=True,
            text=True,
        )
    finally:
        edit(path, data)
    assert (
        done.returncode == 1 and f"{path.name} was edited or replaced" in done.stderr and "Traceback" not in done.stderr
    ), done.stdout + done.stderr


def test_a_stage_that_had_to_hash_an_input_again_keeps_its_stamp(miniature):
    """Also held to what it declares: the next stage only looks at size and times."""
    time.sleep(verified_files.TICK)
    database, listed = miniature / "data" / "danbooru2023.db", miniature / "miniature" / "build" / "inputs.json"
    database.touch()
    old = verified_files.read_stamps(listed).get("../../data/danbooru2023.db")  # none if DVC restored inputs.json
    assert old is None or old.stamp != verified_files.stamp(database)
    before = (miniature / "miniature" / "build" / "selection.parquet").read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "stages" / "select.py")],
        cwd=miniature / "miniature",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert verified_files.read_stamps(listed)["../../data/danbooru2023.db"].stamp == verified_files.stamp(database)
    assert (miniature / "miniature" / "build" / "selection.parquet").read_bytes() == before
