"""dvc.yaml declares each stage's code, inputs and parameters; every recipe has the same dvc.yaml."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kohaku_delta import paths
from kohaku_delta.params import Recipe
from kohaku_delta.provenance import import_closure

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
OTHERS = [stage for stage in PIPELINE if stage != "code"]


@pytest.mark.parametrize("stage", OTHERS)
def test_a_stage_depends_on_its_own_code_and_on_no_other_file_of_the_repository(stage):
    deps = PIPELINE[stage]["deps"]
    assert [dep for dep in deps if dep.startswith("build/code/")] == [f"build/code/{stage}.json"]
    assert [dep for dep in deps if not dep.startswith("build/")] == (["${supplied}"] if stage == "download" else [])


def test_the_first_stage_describes_the_code_of_all_others():
    assert next(iter(PIPELINE)) == "code" and PIPELINE["code"]["outs"] == [
        f"build/code/{stage}.json" for stage in OTHERS
    ]
    assert PIPELINE["code"]["deps"] == ["${root}/src", "${root}/stages", "${root}/requirements"]


@pytest.mark.parametrize("stage", OTHERS)
def test_dvc_can_freeze_every_stage_but_code_and_download(stage):
    """DVC cannot write stages with ${…}, and writes lists sorted; so freezing adds one line (test_dvc_commands.py)."""
    assert ("${" in str(PIPELINE[stage])) == (stage == "download")
    assert all(
        PIPELINE[stage][kind] == sorted(PIPELINE[stage][kind])
        for kind in ("params", "deps", "outs", "metrics")
        if kind in PIPELINE[stage]
    )


@pytest.mark.parametrize("stage", OTHERS)
def test_a_stage_declares_the_sections_that_its_code_reads(stage):
    """Except `execution`, which decides no bits and which no stage declares."""
    script = ROOT / "stages" / f"{stage}.py"
    passed_on = re.search(
        r"[(,] ?recipe[,)]", script.read_text()
    )  # the whole recipe goes to a library function: what may read it counts too
    library = {
        path
        for path in import_closure.closure_files(script)
        if path.parent.name != "sandbox" and path.name != "dvc_checkout.py"
    }  # which read where mirror and work lie: what may be opened, never what comes out
    read = {
        name
        for path in {script, *(library if passed_on else ())}
        for name in re.findall(r"(?:\brecipe|load\(params\))\.([a-z_]+)", path.read_text())
    }
    declared = {each.split(".")[0] for each in PIPELINE[stage].get("params", [])}
    assert (read & set(Recipe.model_fields)) - declared - {"execution", "requirements"} == set()
    assert "execution" not in declared


@pytest.mark.parametrize("recipe", ["miniature", "pilot", "recipes/epsilon-rev1"])
def test_every_recipes_pipeline_has_the_same_bytes_in_a_file_of_its_own(recipe):
    """DVC reads revisions through git, where a symbolic link is a text file."""
    other = ROOT / recipe / "dvc.yaml"
    assert not other.is_symlink() and other.read_bytes() == (ROOT / "dvc.yaml").read_bytes()


def test_every_output_has_its_name_in_the_module_of_paths():
    outs = {str(next(iter(out)) if isinstance(out, dict) else out) for stage in OTHERS for out in _outs(stage)}
    assert outs <= {value for name, value in vars(paths).items() if name.isupper()}


def _outs(stage) -> list:
    return [out for kind in ("outs", "metrics", "plots") for out in PIPELINE[stage].get(kind, [])]


def test_a_stage_fits_on_a_screen():
    stages = re.split(r"\n\n", (ROOT / "dvc.yaml").read_text())
    assert max(len(stage.splitlines()) for stage in stages) < 24


def test_every_stage_script_is_in_the_pipeline():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == set(PIPELINE)


def test_the_standard_librarys_select_is_not_hidden_by_ours():
    import subprocess
    import sys

    code = (
        "import runpy, sys; sys.argv = ['x', '--help']; sys.path[0] = 'stages'; "
        "runpy.run_path('stages/caption.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
