"""The rehearsal replaces what it names and nothing else; at a small size it runs through all stages (slow)."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import rehearse
import synthetic_inputs
from kohaku_delta import params
from kohaku_delta.errors import UserError
from kohaku_delta.sdxl.tokenizer import ClipTokenizer

ROOT = Path(__file__).resolve().parents[2]
REPLACEMENTS = YAML(typ="safe").load(ROOT / "rehearsal" / "replacements.yaml")


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_inputs, "POSTS", 20_000)
    monkeypatch.setattr(synthetic_inputs, "SCALE", 0.1)
    monkeypatch.setattr(rehearse, "DISK", 0)
    monkeypatch.setattr(rehearse, "MEMORY", 0)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path / "rehearsal"


def placed(recipe_folder: Path, folder: Path) -> Path:
    """The folder of a rehearsal whose inputs are files of one byte."""
    folder.mkdir(parents=True)
    recipe = params.load(recipe_folder / "params.yaml")
    for _, _, path in synthetic_inputs.mirror_files(recipe, folder.parent / "mirror", folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    rehearse.write_recipe(recipe_folder, folder)
    return folder


def test_a_rehearsal_differs_from_the_recipe_in_what_it_names_and_in_the_pins_alone(tmp_path):
    folder = placed(ROOT, tmp_path / "release")
    release, rehearsal = (
        dict(rehearse.flattened(YAML(typ="safe").load(path / "params.yaml"))) for path in (ROOT, folder)
    )
    differing = {key for key in release.keys() | rehearsal.keys() if release.get(key) != rehearsal.get(key)}
    named = dict(rehearse.flattened(REPLACEMENTS))
    differing = {key.split(".")[0] if key.startswith("published.") else key for key in differing}
    pins = {key for key in differing if key.startswith("download.inputs.")}
    assert differing - pins == named.keys() | {"root"}
    assert {key: rehearsal[key] for key in named} == named
    assert {key.rpartition(".")[2] for key in pins} <= {"bytes", "sha256", "tars"}
    assert (folder / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()
    head = (folder / "params.yaml").read_text().split("\nroot:")[0]
    assert all(key in head for key in named), "each replacement stands at the head of the rehearsal's params.yaml"
    params.load(folder / "params.yaml")


def test_a_replacement_that_the_recipe_does_not_have_is_named():
    with pytest.raises(UserError, match="replaces train.devices, which the recipe does not have"):
        rehearse.replace({"train": {"device": "cuda"}}, "train.devices", "cpu")


def test_too_little_memory_or_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "MEMORY", 1 << 60)
    with pytest.raises(UserError, match="of main memory"):
        rehearse.begin(ROOT, tmp_path / "rehearsal" / "release")
    monkeypatch.setattr(rehearse, "MEMORY", 0)
    monkeypatch.setattr(rehearse, "DISK", 1 << 60)
    with pytest.raises(UserError, match="choose another folder with --folder"):
        rehearse.begin(ROOT, tmp_path / "rehearsal" / "release")
    assert not list((tmp_path / "rehearsal").rglob("*.*"))


def test_an_unknown_part_is_named_before_anything_is_made(small):
    with pytest.raises(UserError, match="trane is no part of a rehearsal. The parts are code, download, select"):
        rehearse.main(["--folder", str(small), "trane"], standalone_mode=False)
    assert not small.exists()


def test_the_tokenizer_has_clips_number_of_tokens_and_encodes_any_text(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text(synthetic_inputs.tokenizer_file(name), encoding="utf-8")
    tokenizer = ClipTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (49408, 49406, 49407)
    assert tokenizer.eos_token_id not in tokenizer.encode("1girl, 初音ミク (例) 👩‍👩‍👧 ^_^")


@pytest.mark.slow
def test_a_small_rehearsal_runs_through_all_parts_and_is_taken_up_again(small, monkeypatch, capfd):
    """Three minutes on two cores."""
    monkeypatch.setattr(rehearse, "KILLED_AFTER", 14)
    rehearse.main(["--folder", str(small), "code", "download"], standalone_mode=False)
    rehearse.main(["--folder", str(small)], standalone_mode=False)
    assert "verdict: PASS" in capfd.readouterr().out
    figures = json.loads((small / "release" / "figures.json").read_text())
    assert figures.keys() == rehearse.CARRIES_OVER.keys() | {"code"}
    shutil.rmtree(small / "release" / "work")  # nothing is computed again
    rehearse.main(["--folder", str(small)], standalone_mode=False)
    assert json.loads((small / "release" / "figures.json").read_text()) == figures
