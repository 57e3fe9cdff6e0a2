"""A user's mistake ends a stage with one error message, exit code 1, no traceback and no output that looks finished."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
yaml = YAML(typ="safe", pure=True)
READERS = ["select", "filter", "caption", "merge", "schedule", "train", "bake", "export", "preview", "milestones"]


def stage(folder, name, *options):
    return subprocess.run(
        [sys.executable, str(ROOT / "stages" / f"{name}.py"), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )


def refused(done, folder, *words):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ") and all(word in done.stderr for word in words), done.stderr
    assert [path for path in folder.rglob("*") if path.is_file() and path.name != "params.yaml"] == []


@pytest.fixture
def recipe(tmp_path):
    """The miniature's params.yaml in its own folder; a function that writes it again after a change."""
    content = yaml.load((ROOT / "miniature" / "params.yaml").read_text())
    for pins in content["download"]["inputs"].values():
        for pin in pins if isinstance(pins, list) else [pins]:
            pin["url"] = pin["url"].replace("file://../data", f"file://{ROOT}/data")

    def write(change=lambda content: None):
        change(content)
        with open(tmp_path / "params.yaml", "w") as file:
            yaml.dump(content, file)

    write()
    return write


def test_an_input_with_another_sha256_is_refused(recipe, tmp_path):
    recipe(lambda content: content["download"]["inputs"]["database"].update(sha256="0" * 64))
    refused(stage(tmp_path, "download"), tmp_path, "danbooru2023.db", "0" * 64)


def test_an_input_with_another_size_is_refused(recipe, tmp_path):
    recipe(lambda content: content["download"]["inputs"]["database"].update(bytes=5))
    refused(stage(tmp_path, "download"), tmp_path, "danbooru2023.db", "5")


def test_a_missing_tar_is_refused(recipe, tmp_path):
    recipe(lambda content: content["download"]["inputs"]["tars"][0].update(url=f"file://{tmp_path}/data-0004.tar"))
    refused(stage(tmp_path, "download"), tmp_path, "data-0004.tar does not exist")


@pytest.mark.parametrize("name", ["download", *READERS])
def test_every_stage_names_a_wrong_key_and_what_it_should_be(recipe, tmp_path, name):
    recipe(lambda content: content["execution"].update(save_every="often"))
    refused(stage(tmp_path, name), tmp_path, "execution.save_every is 'often'", "whole number")


@pytest.mark.ci
@pytest.mark.parametrize("name", READERS)
def test_every_stage_names_a_missing_output_of_an_earlier_one(recipe, tmp_path, name):
    done = stage(tmp_path, name)
    refused(done, tmp_path, "build/", "does not exist")
