"""In a temporary checkout of DVC's a stage finds the local inputs of the repository, and nothing is linked anywhere
else.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from kohaku_delta.cli.main import main
from kohaku_delta.hub import dvc_checkout

ROOT = Path(__file__).resolve().parents[2]
yaml = YAML(typ="safe", pure=True)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A repository with a recipe's folder and its data, and a checkout of it without the data, as DVC makes one."""
    repository, temporary = tmp_path / "repository", tmp_path / "repository" / ".dvc" / "tmp" / "exps" / "one"
    for folder in (repository, temporary):
        (folder / ".dvc").mkdir(parents=True, exist_ok=True)
        (folder / "miniature").mkdir()
        shutil.copy(ROOT / "miniature" / "params.yaml", folder / "miniature")
    (repository / "data" / "images").mkdir(parents=True)
    (repository / "data" / "danbooru2023.db").write_text("posts")
    monkeypatch.setenv("DVC_ROOT", str(repository))
    return repository, temporary


def test_the_mirror_is_linked_to_the_repositorys(folders):
    repository, temporary = folders
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml")
    assert (temporary / "data").is_symlink() and (temporary / "data" / "danbooru2023.db").read_text() == "posts"
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml")


def test_a_file_outside_of_the_mirror_is_linked_by_itself(folders):
    repository, temporary = folders
    for folder in folders:
        file = folder / "miniature" / "params.yaml"
        content = yaml.load(file.read_text())
        content["download"]["inputs"]["gamma"]["url"] = "file://parents/gamma.safetensors"
        with open(file, "w") as out:
            yaml.dump(content, out)
    (repository / "miniature" / "parents").mkdir()
    (repository / "miniature" / "parents" / "gamma.safetensors").write_text("gamma")
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml")
    assert not (temporary / "miniature" / "parents").is_symlink()
    assert (temporary / "miniature" / "parents" / "gamma.safetensors").read_text() == "gamma"


def test_what_is_there_is_left_as_it_is(folders):
    repository, temporary = folders
    (temporary / "data").mkdir()
    (temporary / "data" / "danbooru2023.db").write_text("other posts")
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml")
    assert (
        not (temporary / "data").is_symlink() and (temporary / "data" / "danbooru2023.db").read_text() == "other posts"
    )


def test_the_trainings_states_lie_in_the_repository_and_outlive_the_checkout(folders):
    repository, temporary = folders
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml")
    assert not os.path.lexists(temporary / "miniature" / "work"), "of other stages than train"
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml", with_work=True)
    (temporary / "miniature" / "work" / "state").write_text("step 20")
    shutil.rmtree(temporary)
    assert (repository / "miniature" / "work" / "state").read_text() == "step 20"


def test_nothing_is_linked_in_the_repository_itself_nor_without_dvc(folders, monkeypatch):
    repository, temporary = folders
    shutil.rmtree(repository / "data")
    dvc_checkout.link_inputs(repository / "miniature" / "params.yaml")
    monkeypatch.delenv("DVC_ROOT")
    dvc_checkout.link_inputs(temporary / "miniature" / "params.yaml")
    assert not os.path.lexists(repository / "data") and not os.path.lexists(temporary / "data")


def test_a_stage_is_run_from_the_code_that_the_recipe_names(tmp_path):
    """`kohaku-delta stage NAME` runs root/stages/NAME.py with what follows, and its exit code is the script's."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "probe.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    (tmp_path / "mine").mkdir()
    shutil.copy(ROOT / "miniature" / "params.yaml", tmp_path / "mine")
    command = [sys.executable, str(ROOT / "src" / "kohaku_delta"), "stage", "probe", "--help", "--out", "a b"]
    done = subprocess.run(command, cwd=tmp_path / "mine", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "['--help', '--out', 'a b']\n"), done.stderr


def test_a_stage_that_does_not_exist_is_refused_with_those_that_do(monkeypatch):
    monkeypatch.chdir(ROOT / "miniature")
    done = CliRunner().invoke(main, ["stage", "bakery"])
    assert (
        done.exit_code == 1 and "../stages/bakery.py does not exist. The stages are bake, caption, code" in done.output
    )
    monkeypatch.chdir(ROOT / "docs")
    done = CliRunner().invoke(main, ["stage", "bake"])
    assert done.exit_code == 1 and "params.yaml does not exist. Name a recipe's folder" in done.output
