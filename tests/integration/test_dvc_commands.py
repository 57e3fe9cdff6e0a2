"""Slow: DVC's own commands on this repository, as a daily user of DVC calls them. Needs the miniature (`make repro`).

    python -m pytest -m slow tests/integration/test_dvc_commands.py

Three minutes on two cores. Nothing is trained: outputs come from a copy of this clone's cache.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FINAL = "build/kohaku-xl-delta.safetensors"
PERSON = {f"GIT_{role}_{what}": "a" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "miniature" / FINAL).is_file(), reason="the miniature is not built here: run `make repro` first"
    ),
]


def run(folder: Path, *command: str, fails: bool = False) -> str:
    """The output of a command that must succeed (or, with `fails`, fail)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")} | PERSON
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert (done.returncode != 0) == fails, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def ran(output: str) -> list[str]:
    """The stages that DVC ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def up_to_date(folder: Path) -> bool:
    return run(folder, "dvc", "status").strip() == "Data and pipelines are up to date."


def clean(folder: Path) -> None:
    """Restore files and outputs as committed."""
    run(folder, "git", "checkout", "--quiet", "--", "..")
    run(folder, "dvc", "checkout", "-q")
    assert up_to_date(folder) and not run(folder, "git", "status", "--porcelain")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The miniature/ of a clone with its own cache and two built revisions that differ in bake.title."""
    folder = tmp_path_factory.mktemp("dvc") / "kohaku"
    run(ROOT, "git", "clone", "--quiet", str(ROOT), str(folder))
    shutil.copytree(run(ROOT, "dvc", "cache", "dir").strip(), folder / ".dvc" / "cache")
    shutil.copy(ROOT / "miniature" / "dvc.lock", folder / "miniature" / "dvc.lock")
    run(folder, "git", "config", "user.name", "a")
    run(folder, "git", "config", "user.email", "a")
    run(folder, "dvc", "checkout", "-q")
    replace(folder / "miniature" / "params.yaml", "in miniature   #", "in miniature, twice   #")
    run(folder / "miniature", "dvc", "repro", "-q")
    run(folder, "git", "commit", "--quiet", "-am", "another title")
    return folder / "miniature"


@pytest.fixture(autouse=True)
def restored(clone):
    """A failed test leaves no changes for the next one."""
    yield
    run(clone, "git", "checkout", "--quiet", "--", "..")
    run(clone, "dvc", "checkout", "-q")


@pytest.fixture(scope="module")
def published(clone, tmp_path_factory):
    """A publisher's remote: a folder with everything that the last revision tracks."""
    folder = tmp_path_factory.mktemp("published")
    run(clone, "dvc", "remote", "add", "published", str(folder))
    run(clone, "git", "commit", "--quiet", "-am", "a remote")
    run(clone, "dvc", "push", "-q", "-r", "published")
    return folder


def test_differences_between_revisions_name_what_differs(clone):
    assert f"miniature/{FINAL}" in run(clone, "dvc", "diff", "HEAD~1")
    diff = json.loads(run(clone, "dvc", "params", "diff", "--json", "HEAD~1"))
    assert list(diff) == ["params.yaml"] and list(diff["params.yaml"]) == ["bake.title"]
    assert "final.loss" in run(clone, "dvc", "metrics", "diff", "--all", "HEAD~1")


def test_metrics_and_plots_are_shown(clone):
    assert "held-out.json" in run(clone, "dvc", "metrics", "show")
    for command in (["show"], ["diff", "HEAD~1"]):
        assert "gradient norm" in run(clone, "dvc", "plots", command[0], "--json", *command[1:])
        run(clone, "dvc", "plots", *command)
    assert (clone / "dvc_plots" / "index.html").is_file() and not run(clone, "git", "status", "--porcelain")


def test_the_status_is_one_line_at_the_root_and_in_the_miniature_until_the_release_is_started(clone):
    assert up_to_date(clone.parent) and up_to_date(clone)
    assert "dvc.yaml' is dvc-ignored" in run(clone.parent, "dvc", "repro", fails=True)
    assert all(
        f"miniature/dvc.yaml:{stage}" in run(clone.parent, "dvc", "dag", "--mermaid") for stage in ("code", "bake")
    )
    assert "bake" in run(clone, "dvc", "dag")
    run(clone.parent, "make", "begin")
    assert "build/kohaku-xl-delta.safetensors" in run(clone.parent, "dvc", "status", "bake")
    assert "code" in ran(run(clone.parent, "dvc", "repro", "--dry", "code"))
    clean(clone)
    pilot = clone.parent / "pilot"
    assert up_to_date(pilot) and "dvc.yaml' is dvc-ignored" in run(pilot, "dvc", "repro", fails=True)
    replace(clone.parent / ".dvcignore", "/pilot/dvc.yaml\n", "")  # as `make pilot` does
    assert "code" in ran(run(pilot, "dvc", "repro", "--dry", "code"))
    clean(clone)
    epsilon = clone.parent / "recipes" / "epsilon-rev1"
    assert up_to_date(epsilon) and "dvc.yaml' is dvc-ignored" in run(epsilon, "dvc", "repro", fails=True)
    run(clone.parent, "make", "begin", "BEGIN=recipes/epsilon-rev1")
    assert "code" in ran(run(epsilon, "dvc", "repro", "--dry", "code"))
    clean(clone)


def test_another_revision_is_checked_out_and_back_and_a_change_is_stashed(clone):
    """git checkout, then dvc checkout: nothing runs."""
    before = (clone / FINAL).read_bytes()
    run(clone, "git", "checkout", "--quiet", "HEAD~1")
    run(clone, "dvc", "checkout", "-q")
    assert up_to_date(clone) and (clone / FINAL).read_bytes() != before
    run(clone, "git", "checkout", "--quiet", "-")
    replace(clone / "params.yaml", "in miniature, twice", "in miniature, stashed")
    assert ran(run(clone, "dvc", "repro", "bake")) == ["bake"]
    run(clone, "git", "stash", "--quiet")
    run(clone, "dvc", "checkout", "-q")
    assert up_to_date(clone) and (clone / FINAL).read_bytes() == before
    run(clone, "git", "stash", "pop", "--quiet")
    run(clone, "dvc", "checkout", "-q")
    assert not ran(run(clone, "dvc", "repro", "bake")) and (clone / FINAL).read_bytes() != before
    clean(clone)


def test_a_detached_worktree_is_built_from_the_cache(clone, tmp_path):
    run(clone, "git", "worktree", "add", "--quiet", "--detach", str(tmp_path / "other"), "HEAD~1")
    run(tmp_path / "other", "dvc", "cache", "dir", "--local", str(clone.parent / ".dvc" / "cache"))
    run(tmp_path / "other", "dvc", "checkout", "-q", "data.dvc")  # download depends on it
    assert not ran(run(tmp_path / "other" / "miniature", "dvc", "repro"))
    assert not run(tmp_path / "other", "git", "status", "--porcelain")
    run(clone, "git", "worktree", "remove", "--force", str(tmp_path / "other"))


def test_an_experiment_is_run_shown_compared_applied_branched_and_removed(clone):
    """A changed title runs only `bake` again."""
    assert ran(run(clone, "dvc", "exp", "run", "-n", "titled", "-S", "bake.title=An experiment", "bake")) == ["bake"]
    baked = (clone / FINAL).read_bytes()
    clean(clone)
    assert "titled" in run(clone, "dvc", "exp", "show", "--csv", "--only-changed")
    diff = json.loads(run(clone, "dvc", "exp", "diff", "--json", "HEAD", "titled"))
    assert diff["params"]["miniature/params.yaml"].keys() == {"bake.title"}
    assert "bake.title" in run(clone, "dvc", "exp", "diff", "titled")
    run(clone, "dvc", "exp", "apply", "titled")
    assert "An experiment" in (clone / "params.yaml").read_text() and (clone / FINAL).read_bytes() == baked
    clean(clone)
    run(clone, "dvc", "exp", "branch", "titled", "from-titled")
    run(clone, "dvc", "exp", "remove", "titled")
    assert "titled" not in run(clone, "dvc", "exp", "list")
    run(clone, "git", "branch", "-D", "from-titled")


def test_an_experiment_in_a_temporary_folder_downloads_again_and_links_the_inputs(clone):
    """The checkout has no ../data: it is linked to the repository's. The workspace stays as it is."""
    output = run(
        clone, "dvc", "exp", "run", "--temp", "-n", "seeded", "-S", "preview.seed=77", "download", "statistics"
    )
    assert ran(output) == ["download", "statistics"] or ran(output) == ["download"], output
    assert up_to_date(clone) and (clone.parent / "data").is_dir() and not (clone.parent / "data").is_symlink()
    run(clone, "dvc", "exp", "apply", "seeded")
    lock = (clone / "dvc.lock").read_text()
    clean(clone)
    inputs = [
        text.split("path: build/inputs.json")[1].split("size:")[0] for text in (lock, (clone / "dvc.lock").read_text())
    ]
    assert inputs[0] == inputs[1], "a temporary checkout has another inputs.json"
    run(clone, "dvc", "exp", "remove", "seeded")


def test_a_stage_that_reads_the_inputs_runs_in_a_temporary_folder(clone):
    """`select` opens the database, which only the repository has; later stages have the same inputs and are cached."""
    run(clone, "dvc", "exp", "run", "--temp", "-n", "forced", "--single-item", "--force", "select")
    assert up_to_date(clone)


def test_queued_experiments_are_run(clone):
    run(clone, "dvc", "exp", "run", "--queue", "-n", "queued", "-S", "bake.title=Queued", "bake")
    run(clone, "dvc", "exp", "run", "--queue", "-n", "queued-download", "-S", "preview.seed=78", "download")
    run(clone, "dvc", "queue", "start")
    deadline = time.monotonic() + 120
    while (status := run(clone, "dvc", "queue", "status")).count("Success") < 2:
        assert "Failed" not in status and time.monotonic() < deadline, status + run(
            clone, "dvc", "queue", "logs", "queued-download"
        )
        time.sleep(1)
    references = run(clone, "git", "for-each-ref", "--format=%(refname)", "refs/exps/")
    queued = next(name for name in references.split() if name.endswith("/queued"))
    assert "Queued" in run(clone, "git", "show", f"{queued}:./params.yaml")
    assert up_to_date(clone)
    run(clone, "dvc", "exp", "remove", "queued", "queued-download")


def test_a_bare_push_puts_nothing_into_the_remote_that_git_tracks(clone):
    for command in (["push"], ["push", "-a"], ["exp", "save", "-n", "saved"]):
        run(clone, "dvc", *command, fails=command[0] == "push")
    run(clone, "git", "init", "--quiet", "--bare", str(clone.parent.parent / "git"))
    run(clone, "git", "remote", "add", "elsewhere", str(clone.parent.parent / "git"))
    output = run(clone, "dvc", "exp", "push", "elsewhere", "saved")
    assert "uploaded" not in output and not Path("/miniature").exists(), output
    run(clone, "dvc", "exp", "remove", "saved")
    assert not run(clone, "git", "status", "--porcelain")


def test_an_experiment_is_pushed_with_its_outputs_and_pulled(clone, published):
    run(clone, "dvc", "exp", "run", "-q", "-n", "shared", "-S", "bake.title=Shared", "bake")
    clean(clone)
    run(clone, "git", "init", "--quiet", "--bare", str(clone.parent.parent / "shared"))
    run(clone, "git", "remote", "add", "shared", str(clone.parent.parent / "shared"))
    assert "1 file uploaded" in run(clone, "dvc", "exp", "push", "shared", "shared", "-r", "published")
    run(clone, "dvc", "exp", "remove", "shared")
    run(clone, "dvc", "exp", "pull", "shared", "shared", "-r", "published")
    assert "shared" in run(clone, "dvc", "exp", "list")


def test_everything_is_pushed_and_pulled_by_another_clone(clone, published, tmp_path):
    run(tmp_path, "git", "clone", "--quiet", str(clone.parent), "other")
    run(tmp_path / "other", "dvc", "pull", "-q", "-r", "published")
    assert up_to_date(tmp_path / "other" / "miniature") and not ran(
        run(tmp_path / "other" / "miniature", "dvc", "repro")
    )
    assert (tmp_path / "other" / "miniature" / FINAL).read_bytes() == (clone / FINAL).read_bytes()


def test_files_are_listed_fetched_imported_and_opened_from_the_repositorys_address(clone, published, tmp_path):
    """DVC does not follow a relative remote of a repository's address: a publisher adds another one."""
    address = str(clone.parent)
    assert "kohaku-xl-delta.safetensors" in run(tmp_path, "dvc", "list", address, "miniature/build")
    run(tmp_path, "dvc", "get", "-q", address, f"miniature/{FINAL}", "--remote", "published", "-o", "final.safetensors")
    assert (tmp_path / "final.safetensors").read_bytes() == (clone / FINAL).read_bytes()
    run(tmp_path, "dvc", "get", "-q", address, "data/tokenizer", "--remote", "published", "-o", "tokenizer")
    assert (tmp_path / "tokenizer" / "vocab.json").read_bytes() == (
        clone.parent / "data" / "tokenizer" / "vocab.json"
    ).read_bytes()

    run(tmp_path, "git", "init", "--quiet", "mine")
    run(tmp_path / "mine", "dvc", "init", "-q")
    run(tmp_path / "mine", "dvc", "import", "-q", address, f"miniature/{FINAL}", "--remote", "published")
    run(tmp_path / "mine", "dvc", "import", "-q", address, "data", "--remote", "published")
    run(tmp_path / "mine", "dvc", "update", "-q", "kohaku-xl-delta.safetensors.dvc")
    assert (
        up_to_date(tmp_path / "mine")
        and (tmp_path / "mine" / "data" / "danbooru2023.db").stat().st_size
        == (clone.parent / "data" / "danbooru2023.db").stat().st_size
    )

    for name, place in (
        (f"miniature/{FINAL}", clone / FINAL),
        ("data/danbooru2023.db", clone.parent / "data" / "danbooru2023.db"),
    ):
        options = f"repo={address!r}, remote='published', mode='rb'"
        code = f"import dvc.api\nwith dvc.api.open({name!r}, {options}) as file: print(len(file.read()))"
        assert int(run(tmp_path, sys.executable, "-c", code).split()[-1]) == place.stat().st_size


def test_freezing_a_stage_adds_one_line_and_unfreezing_gives_the_same_bytes(clone):
    before = (clone / "dvc.yaml").read_bytes()
    run(clone, "dvc", "freeze", "train")
    assert run(clone, "git", "diff", "--numstat", "--", "dvc.yaml").split()[:2] == ["1", "0"]
    replace(clone / "params.yaml", "tag_dropout: 0.1\n", "tag_dropout: 0.2\n")
    assert "train" not in ran(run(clone, "dvc", "repro", "--dry", "train"))
    run(clone, "git", "checkout", "--quiet", "params.yaml")
    run(clone, "dvc", "unfreeze", "train")
    assert (clone / "dvc.yaml").read_bytes() == before
    for stage in ("code", "download"):
        assert "cannot dump a parametrized stage" in run(clone, "dvc", "freeze", stage, fails=True)


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "reflink,hardlink,copy"])
def test_outputs_and_data_may_be_links_into_the_cache(clone, kind):
    """A stage that reads links, or replaces one, leaves the cache unchanged."""
    run(clone, "dvc", "config", "--local", "cache.type", kind)
    run(clone, "dvc", "checkout", "-q", "--relink")
    assert (clone / FINAL).is_symlink() == (kind == "symlink")
    assert ran(run(clone, "dvc", "repro", "--force", "--single-item", "caption")) == ["caption"] and up_to_date(clone)
    replace(clone / "params.yaml", "in miniature, twice", f"in miniature, {kind}")
    assert ran(run(clone, "dvc", "repro", "bake")) == ["bake"]
    clean(clone)
    run(clone, "dvc", "unprotect", FINAL)
    assert up_to_date(clone)
    run(clone, "dvc", "config", "--local", "--unset", "cache.type")
    run(clone, "dvc", "checkout", "-q", "--relink")


def test_parameters_of_time_and_place_run_nothing_again(clone):
    replace(clone / "params.yaml", "  workers: 0 ", "  workers: 2 ")
    replace(clone / "params.yaml", "  ranks: 2 ", "  ranks: 1 ")
    assert not ran(run(clone, "dvc", "repro"))
    clean(clone)


def test_a_comment_runs_the_stage_code_alone_and_may_be_committed_instead(clone):
    source = clone.parent / "src" / "kohaku_delta" / "training" / "optimizer.py"
    source.write_text(source.read_text() + "\n# A comment.\n")
    assert ran(run(clone, "dvc", "repro")) == ["code"]
    source.write_text(source.read_text() + "\n# Another.\n")
    run(clone, "dvc", "commit", "-q", "-f", "code")
    assert up_to_date(clone)
    run(clone.parent, "git", "checkout", "--quiet", "--", ".")
    clean(clone)


def test_an_invalid_value_of_requirements_is_refused_with_the_valid_ones(clone):
    replace(clone / "params.yaml", "requirements: cpu", "requirements: gpu")
    output = run(clone, "dvc", "repro", fails=True)
    assert "Error: params.yaml: requirements is 'gpu'; it must be 'cpu' or 'cuda'." in output and "Errno" not in output
    clean(clone)


def test_an_input_that_was_edited_in_place_is_noticed_and_refused(clone):
    database = clone.parent / "data" / "danbooru2023.db"
    data = database.read_bytes()
    database.unlink()  # it may be a link into the cache
    database.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    output = run(clone, "dvc", "repro", "caption", fails=True)
    assert (
        "danbooru2023.db has the sha256" in output
        and "put the pinned file back" in output
        and "Running stage 'caption'" not in output
    )
    database.write_bytes(data)
    run(clone, "git", "checkout", "--quiet", "--", "../data.dvc")
    run(clone, "dvc", "repro", "-q", "bake")
    assert run(clone, "git", "status", "--short", "../data.dvc") == ""


def test_gc_removes_nothing_that_is_used(clone):
    """The last test: afterwards the cache has only what branches use."""
    run(clone, "dvc", "gc", "-w", "-a", "-f")
    shutil.rmtree(clone / "build")
    shutil.rmtree(clone.parent / "data")
    run(clone, "dvc", "checkout", "-q")
    assert up_to_date(clone.parent) and not ran(run(clone, "dvc", "repro"))
    run(clone, "dvc", "gc", "-w", "-f")
    run(clone, "dvc", "checkout", "-q")
    assert up_to_date(clone)
