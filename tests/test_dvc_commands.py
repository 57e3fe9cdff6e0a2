"""Slow: DVC's own commands on this repository, as somebody who uses DVC every day would call them. Needs a built miniature (`make repro`).

    python -m pytest -m slow tests/test_dvc_commands.py      a few minutes; nothing is trained: outs come from the cache of this clone
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".dvc" / "cache"
FINAL = "build/kohaku-xl-delta.safetensors"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "miniature" / FINAL).is_file(), reason="the miniature is not built here: run `make repro` first")]


def run(folder: Path, *command: str, fails: bool = False) -> str:
    """What a command prints; it must succeed (or fail)."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"})
    assert (done.returncode != 0) == fails, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with two revisions that differ in bake.title, built from this clone's cache; its miniature/."""
    folder = tmp_path_factory.mktemp("dvc") / "kohaku"
    run(ROOT, "git", "clone", "--quiet", str(ROOT), str(folder))
    run(folder, "dvc", "cache", "dir", "--local", str(CACHE))
    shutil.copy(ROOT / "miniature" / "dvc.lock", folder / "miniature" / "dvc.lock")
    run(folder, "dvc", "pull", "-q", "data.dvc")
    run(folder / "miniature", "dvc", "checkout", "-q", "dvc.yaml")
    params = folder / "miniature" / "params.yaml"
    params.write_text(params.read_text().replace("in miniature   #", "in miniature, twice   #"))
    run(folder / "miniature", "dvc", "repro", "-q", "bake")
    run(folder, "git", "commit", "--quiet", "-am", "another title")
    return folder / "miniature"


def test_differences_between_revisions_name_what_differs(clone):
    assert FINAL in run(clone, "dvc", "diff", "HEAD~1")
    told = json.loads(run(clone, "dvc", "params", "diff", "--json", "HEAD~1"))
    assert list(told) == ["params.yaml"] and list(told["params.yaml"]) == ["bake.title"]
    run(clone, "dvc", "metrics", "diff", "HEAD~1")


def test_metrics_and_plots_are_shown(clone):
    assert "held-out.json" in run(clone, "dvc", "metrics", "show")
    run(clone, "dvc", "plots", "show", "--json")
    run(clone, "dvc", "plots", "diff", "--json", "HEAD~1")


def test_the_graph_and_the_status(clone):
    assert "bake" in run(clone, "dvc", "dag")
    assert len(run(clone, "dvc", "status", "bake").splitlines()) < 10


def test_files_of_a_revision_are_listed_fetched_and_opened_from_the_repositorys_address(clone, tmp_path):
    """DVC does not follow a relative remote of a repository's address: a publisher adds one of his own."""
    published = tmp_path / "published"
    run(clone, "dvc", "remote", "add", "published", str(published))
    run(clone, "dvc", "push", "-q", "-r", "published", FINAL)
    run(clone, "git", "commit", "--quiet", "-am", "a remote")
    address = str(clone.parent)
    assert "kohaku-xl-delta.safetensors" in run(tmp_path, "dvc", "list", address, "miniature/build")
    run(tmp_path, "dvc", "get", "-q", address, f"miniature/{FINAL}", "--remote", "published", "-o", str(tmp_path / "final.safetensors"))
    assert (tmp_path / "final.safetensors").read_bytes() == (clone / FINAL).read_bytes()
    code = f"import dvc.api; print(len(dvc.api.read('miniature/{FINAL}', repo={address!r}, remote='published', mode='rb')))"
    assert int(run(tmp_path, sys.executable, "-c", code).split()[-1]) == (clone / FINAL).stat().st_size


def test_an_experiment_is_run_shown_compared_and_applied(clone):
    """A changed title bakes again, and no more; the queue and a temporary folder do the same."""
    said = run(clone, "dvc", "exp", "run", "-n", "titled", "-S", "bake.title=An experiment", "bake")
    assert "train" not in [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    assert "titled" in run(clone, "dvc", "exp", "show", "--csv")
    assert "bake.title" in run(clone, "dvc", "exp", "diff", "titled")
    run(clone, "git", "checkout", "--quiet", "--", ".")
    run(clone, "dvc", "checkout", "-q", "dvc.yaml")
    run(clone, "dvc", "exp", "apply", "titled")
    assert "An experiment" in (clone / "params.yaml").read_text()
    run(clone, "git", "checkout", "--quiet", "--", ".")
    run(clone, "dvc", "checkout", "-q", "dvc.yaml")


def test_what_decides_only_time_and_place_runs_nothing_again(clone):
    params = clone / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("  workers: 0 ", "  workers: 2 ").replace("  ranks: 2 ", "  ranks: 1 "))
    assert "Running stage" not in run(clone, "dvc", "repro", "bake")
    params.write_text(text)


def test_a_comment_runs_the_stage_code_alone(clone):
    source = clone.parent / "src" / "kohaku_delta" / "training" / "optimizer.py"
    text = source.read_text()
    source.write_text(text + "\n# A comment.\n")
    said = run(clone, "dvc", "repro", "bake")
    assert [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")] == ["code"]
    source.write_text(text)
    run(clone, "dvc", "repro", "-q", "bake")


def test_an_input_that_was_edited_in_place_is_noticed_and_refused(clone):
    database = clone.parent / "data" / "danbooru2023.db"
    data = database.read_bytes()
    database.unlink()  # it may be a link into the cache
    database.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = run(clone, "dvc", "repro", "caption", fails=True)
    assert "danbooru2023.db has the sha256" in said and "put the pinned file back" in said and "Running stage 'caption'" not in said
    database.write_bytes(data)
    run(clone, "git", "checkout", "--quiet", "--", "../data.dvc")
    run(clone, "dvc", "repro", "-q", "bake")
    assert run(clone, "git", "status", "--short", "../data.dvc") == ""


def test_the_cache_is_cleared_of_nothing_that_is_used(clone):
    run(clone, "dvc", "gc", "-w", "-a", "-f", "--dry")
