"""Slow: the walkthrough at the beginning of docs/recipe.md, run command by command in a clone.

python -m pytest -m slow tests/integration/test_walk.py      about two minutes; needs git and the environment
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_delta import params
from kohaku_delta.formats import parquet

ROOT = Path(__file__).resolve().parents[2]
WALK = (ROOT / "docs" / "recipe.md").read_text().partition("\n## Every key")[0]
BLOCKS = re.findall(r"```sh\n(.*?)```", WALK, re.DOTALL)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with .venv and the miniature's inputs, as the walkthrough needs it, and with uncommitted changes."""
    folder = tmp_path_factory.mktemp("walk") / "kohaku"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in changed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    shutil.copytree(ROOT / "data", folder / "data")
    return folder


@pytest.fixture(scope="module")
def outputs(clone):
    """The output of each block; they run one after another in one shell, which ends at the first that fails."""
    script = "set -e\n" + "".join(f"echo '=== {number}'\n{block}" for number, block in enumerate(BLOCKS))
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    blocks = re.split(r"^=== \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert done.returncode == 0, f"block {len(blocks)} of {len(BLOCKS)}:\n{blocks[-1]}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return blocks


def test_the_walkthrough_ends_with_a_model_trained_on_all_own_images(clone, outputs):
    build = clone / "own" / "build"
    assert (build / "kohaku-xl-delta.safetensors").stat().st_size > 5_000_000 and (
        build / "diffusers" / "model_index.json"
    ).is_file()
    assert parquet.read(build / "posts.parquet", ["post_id"])["post_id"].to_pylist() == [
        1000 * number for number in range(1, 25)
    ]
    captions = parquet.read(build / "captions.parquet", ["caption"])["caption"].to_pylist()
    assert captions[1].startswith("red square, own shapes, me, |||no humans, square, red body, highres, newest, safe, ")
    assert parquet.read(build / "journal.parquet").num_rows > 3


def test_a_recipe_that_trains_on_all_posts_has_no_held_out_loss(clone, outputs):
    build = clone / "own" / "build"
    assert json.loads((build / "held-out.json").read_text()) == {"posts": 0, "reason": "preview.held_out is 0"}
    assert any("preview: no held-out loss (preview.held_out is 0)" in block for block in outputs)
    assert "There is no held-out loss: preview.held" in (build / "README.md").read_text()
    assert "There is no held-out loss: preview.held_out is 0." in (build / "report.html").read_text()


def test_the_plan_of_an_own_base_is_not_that_of_sdxl(outputs):
    plan = next(block for block in outputs if "disk in all" in block)
    assert " GB  " not in plan.partition("green")[0], plan


def test_an_audit_of_an_own_recipe_finds_no_fault(outputs):
    audit = outputs[-2]
    assert "PASS" in audit and "FAIL" not in audit, audit


def test_an_edit_of_the_own_images_is_noticed(clone, outputs):
    assert (
        "Running stage 'download'" in outputs[-1]
        and "Running stage 'caption'" in outputs[-1]
        and "Running stage 'train'" not in outputs[-1]
    )
    captions = parquet.read(clone / "own" / "build" / "captions.parquet", ["caption"])["caption"].to_pylist()
    assert sum("smile" in caption for caption in captions) == 3


def test_the_recipe_of_the_walkthrough_is_complete(clone, outputs):
    recipe = params.load(clone / "own" / "params.yaml")
    assert recipe.merge.start == "published" and recipe.published is None and recipe.supplied == "data"
    assert (clone / "own" / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()


def test_every_command_of_the_walkthrough_is_in_a_block_that_runs_here():
    assert len(BLOCKS) == 8 and "```bash" not in WALK and WALK.count("```") == 2 * len(BLOCKS)
