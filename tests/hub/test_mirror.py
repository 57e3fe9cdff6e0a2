"""Only what was hashed and agrees with its pin counts as there."""

import hashlib
import json
from pathlib import Path

import pytest

from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest, mirror, pins
from kohaku_delta.params import Download, Pin, load

DATA = b"a small input"
SHA256 = hashlib.sha256(DATA).hexdigest()


def pin(path, **changes):
    return Pin(**({"url": f"file://{path}", "bytes": len(DATA), "sha256": SHA256} | changes))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "input.bin"
    path.write_bytes(DATA)
    return path


def test_a_pinned_file_is_listed_with_its_hash(file, tmp_path):
    entries = mirror.resolve_inputs(
        Download(mirror="m", images="all", inputs={"sdxl": pin(file), "tars": [pin(file, sha256=None, bytes=None)]}),
        tmp_path,
    )
    inputs_manifest.write(entries, tmp_path, "merge", tmp_path / "inputs.json")
    said = json.loads((tmp_path / "inputs.json").read_text())
    assert (
        said["inputs"]["sdxl"]
        == {"path": str(file), "bytes": 13, "sha256": SHA256, "url": f"file://{file}", "pinned": "sha256"}
        and said["start"] == "merge"
    )
    assert inputs_manifest.path(tmp_path / "inputs.json", "sdxl") == file and inputs_manifest.paths(
        tmp_path / "inputs.json", "tars"
    ) == [file]


def test_ten_known_digits_are_compared(file):
    assert mirror.verify_file(file, pin(file, sha256=SHA256[:10])).sha256 == SHA256
    with pytest.raises(UserError, match="sha256"):
        mirror.verify_file(file, pin(file, sha256="0123456789"))


@pytest.mark.parametrize("changes, word", [({"bytes": 12}, "13 bytes"), ({"sha256": "0" * 64}, "another file")])
def test_another_size_or_hash_is_refused(file, changes, word):
    with pytest.raises(UserError, match=word):
        mirror.verify_file(file, pin(file, **changes))


def test_a_missing_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        mirror.resolve_inputs(Download(mirror="m", images="all", inputs={"sdxl": pin(tmp_path / "none")}), tmp_path)


def test_relative_places_are_seen_from_params_and_found_from_anywhere(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    entries = mirror.resolve_inputs(
        Download(mirror="m", images="all", inputs={"sdxl": pin("../input.bin")}), Path("recipe")
    )
    inputs_manifest.write(entries, Path("recipe"), "merge", Path("recipe/build/inputs.json"))
    monkeypatch.chdir("/")
    assert inputs_manifest.path(tmp_path / "recipe" / "build" / "inputs.json", "sdxl") == file


def test_an_input_that_changed_its_size_after_the_download_is_refused(file, tmp_path):
    inputs_manifest.write(
        mirror.resolve_inputs(Download(mirror="m", images="all", inputs={"sdxl": pin(file)}), tmp_path),
        tmp_path,
        "merge",
        tmp_path / "inputs.json",
    )
    file.write_bytes(DATA + b"!")
    with pytest.raises(UserError, match="14 bytes"):
        inputs_manifest.path(tmp_path / "inputs.json", "sdxl")
    with pytest.raises(UserError, match="names no input 'gamma'"):
        inputs_manifest.path(tmp_path / "inputs.json", "gamma")


def test_every_pin_of_the_release_names_a_place_and_a_whole_revision():
    recipe = load("params.yaml").download.inputs
    places = {
        name: pins.hub_file(each)
        for name, each in recipe.items()
        if isinstance(each, Pin) and each.url.startswith("hf://")
    }
    assert places["database"] == pins.HubFile(
        "KBlueLeaf/danbooru2023-sqlite", "dataset", "5a6b5e4421c384dd3613d1c6553518e6d63e6eff", "danbooru2023.db"
    )
    assert places["beta"].repo == "nnnn1111/models" and places["beta"].kind == "model"
    assert all(len(place.revision) == 40 for place in places.values())
    tars = pins.expand_span(recipe["tars"][0], Path("pins-tars.csv"))
    assert (
        len(tars) == 2001
        and tars[0].url.endswith("/images/data-0000.tar")
        and tars[-1].url.endswith("/images/data-2000.tar")
    )


def test_a_branch_is_no_pin():
    with pytest.raises(UserError, match="can move"):
        pins.hub_file(Pin(url="hf://owner/name@main/file.bin", bytes=None, sha256=None))
