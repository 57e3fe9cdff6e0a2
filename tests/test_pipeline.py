"""dvc.yaml declares what each stage runs, reads and is told; both recipes share it."""

import re
from pathlib import Path

import closure
import pytest
from ruamel.yaml import YAML

from kohaku_delta.params import Recipe

PIPELINE = YAML(typ="safe", pure=True).load(open(Path(__file__).resolve().parents[1] / "dvc.yaml"))["stages"]
ROOT = closure.ROOT


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_declares_its_code_and_the_lock_of_its_libraries(stage):
    script = ROOT / "stages" / f"{stage}.py"
    needed = {f"${{root}}/{path.relative_to(ROOT)}" for path in closure.closure(script)} | {f"${{root}}/stages/{stage}.py", "${root}/requirements/${requirements}.txt"}
    declared = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith("${root}")}
    assert needed - declared == set(), "add these lines to dvc.yaml"
    assert declared - needed == set(), "these are not run by the stage"


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_declares_the_sections_that_its_code_reads(stage):
    script = ROOT / "stages" / f"{stage}.py"
    passed_on = re.search(r"[(,] ?recipe[,)]", script.read_text())  # the whole recipe goes to a library function: what may read it counts too
    library = {path for path in closure.closure(script) if path.parent.name != "hermetic"}  # which reads where mirror and work lie: what may be opened, never what comes out
    read = {name for path in {script, *(library if passed_on else ())} for name in re.findall(r"(?:\brecipe|load\(params\))\.([a-z_]+)", path.read_text())}
    declared = {each.split(".")[0] for each in PIPELINE[stage].get("params", [])}
    assert (read & set(Recipe.model_fields)) - declared == set()


def test_the_miniature_runs_the_same_pipeline():
    link = ROOT / "miniature" / "dvc.yaml"
    assert link.is_symlink() and link.resolve() == ROOT / "dvc.yaml"


def test_every_stage_script_is_in_the_pipeline():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == set(PIPELINE)


def test_the_standard_librarys_select_is_not_hidden_by_ours():
    import subprocess
    import sys

    code = "import runpy, sys; sys.argv = ['x', '--help']; sys.path[0] = 'stages'; runpy.run_path('stages/caption.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
