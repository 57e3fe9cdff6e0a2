"""The setup of the environment, and the options that every command has. The slow tests install the whole lock."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kohaku_delta.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup_environment.sh"
SUBCOMMANDS = [[], *([name] for name in COMMANDS if name != "stage")]  # `stage` hands every option to its script
STAGES = sorted(path.name for path in (ROOT / "stages").glob("*.py"))


def fake(folder: Path, name: str, body: str) -> Path:
    """A program of that name which notes its arguments in folder/calls."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{folder}/calls"\n{body}\n')
    path.chmod(0o755)
    return path


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOCK", "WHEELS", "UV", "VENV", "PYTHON", "MAKEFLAGS")
    }
    environment = {**kept, "VENV": str(folder / "venv"), "UV": str(folder / "uv"), **environment}
    return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)


UV = """case "$*" in
    *--help*) echo --torch-backend ;;
    --version) echo "uv 0" ;;
    venv*)
        for last; do :; done
        mkdir -p "$last/bin"
        printf '#!/bin/sh\\necho Python 3.11' > "$last/bin/python"
        chmod +x "$last/bin/python" ;;
esac"""


def test_without_python_3_11_uv_does_it_hash_locked_and_from_pytorchs_index(tmp_path):
    fake(tmp_path, "uv", UV)
    done = setup(tmp_path, PYTHON="no-such-python")
    assert (
        done.returncode == 0
        and "no-such-python is not a Python 3.11" in done.stdout
        and "going on with uv" in done.stdout
    )
    installs = [line for line in (tmp_path / "calls").read_text().splitlines() if "pip install --python" in line]
    assert len(installs) == 3 and all("--no-build-isolation" in line and "--no-deps" in line for line in installs)
    assert all("--require-hashes" in line and "--torch-backend cpu" in line for line in installs[:2]) and installs[
        2
    ].endswith("--no-index --editable .")
    assert (tmp_path / "venv" / "requirements.txt").read_bytes() == (ROOT / "requirements" / "cpu.txt").read_bytes()


def test_a_folder_of_wheels_means_no_network(tmp_path):
    fake(tmp_path, "uv", UV)
    assert setup(tmp_path, PYTHON="no-such-python", WHEELS=str(tmp_path)).returncode == 0
    calls = [
        line
        for line in (tmp_path / "calls").read_text().splitlines()
        if "--help" not in line and "--version" not in line
    ]
    assert all("--offline" in line for line in calls) and not any("--torch-backend" in line for line in calls)


def test_the_cuda_lock_comes_from_the_ordinary_index(tmp_path):
    fake(tmp_path, "uv", UV)
    assert setup(tmp_path, PYTHON="no-such-python", LOCK="cuda").returncode == 0
    assert "--torch-backend cpu" not in (tmp_path / "calls").read_text().replace("--help", "")


def test_a_setup_that_failed_does_not_look_finished(tmp_path):
    fake(tmp_path, "uv", UV.replace("--version)", "*--require-hashes*) exit 1 ;;\n    --version)"))
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "requirements.txt").touch()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    done = setup(tmp_path, PYTHON="no-such-python")
    assert done.returncode == 1 and not (tmp_path / "venv" / "requirements.txt").exists()
    assert done.stderr.count("Error: ") == 1 and "WHEELS=folder" in done.stderr


@pytest.mark.parametrize(
    "environment, message", [({"LOCK": "gpu"}, "LOCK=cpu or LOCK=cuda"), ({"WHEELS": "no/such/folder"}, "make wheels")]
)
def test_what_is_not_there_is_refused_in_one_line(tmp_path, environment, message):
    done = setup(tmp_path, **environment)
    assert (
        done.returncode == 1
        and done.stderr.startswith("Error: ")
        and done.stderr.count("\n") == 1
        and message in done.stderr
    )


def test_a_folder_that_is_no_virtual_environment_is_never_cleared(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "requirements.txt").write_text("mine")
    done = setup(tmp_path)
    assert done.returncode == 1 and "is not a virtual environment" in done.stderr
    assert (tmp_path / "venv" / "requirements.txt").read_text() == "mine"
    done = subprocess.run(
        ["make", "--no-print-directory", f"VENV={tmp_path / 'venv'}", "environment"], cwd=ROOT, capture_output=True
    )
    assert done.returncode and (tmp_path / "venv" / "requirements.txt").read_text() == "mine"


def test_what_builds_source_archives_is_in_both_locks_and_uv_is_hash_locked():
    for lock in ("cpu", "cuda"):
        assert re.search(
            r"^setuptools==\S+ \\\n    --hash=sha256:", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.M
        )
    assert re.fullmatch(
        r"uv==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", (ROOT / "requirements" / "uv.txt").read_text()
    )


def test_no_index_is_named_in_the_repository():
    hosts = re.compile(
        "|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch", r"index-url[= ]\S*https?:"])
    )
    files = subprocess.run(
        ["git", "ls-files", "*.sh", "*.md", "*.txt", "*.in", "*.toml", "*.py", "Makefile", "Dockerfile", ".ci"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert files.stdout and not [name for name in files.stdout.split() if hosts.search((ROOT / name).read_text())]


def test_the_workflow_and_the_local_script_run_the_same_commands():
    steps = YAML(typ="safe", pure=True).load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["miniature"]["steps"]
    script = (ROOT / ".ci" / "run").read_text().partition('cd "$clone/kohaku"\n')[2].splitlines()
    assert [step["run"] for step in steps if "run" in step] == script[:-1] and script[-1].startswith("echo ")


@pytest.mark.parametrize("words", SUBCOMMANDS, ids=lambda words: "".join(words) or "kohaku-delta")
def test_each_command_has_a_short_help_and_a_version(words):
    from click.testing import CliRunner

    from kohaku_delta.cli.main import main

    assert CliRunner().invoke(main, [*words, "-h"]).output.startswith("Usage: ")
    assert re.fullmatch(r"kohaku-delta \d+\.\d+\.\d+\n", CliRunner().invoke(main, [*words, "--version"]).output)


def test_the_command_of_the_stages_has_a_help_anywhere_and_leaves_options_to_the_stage(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from kohaku_delta.cli import stage
    from kohaku_delta.cli.main import main

    started = []
    monkeypatch.setattr(stage.os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.chdir(ROOT / "miniature")
    assert CliRunner().invoke(main, ["stage", "caption", "--help", "-h", "--out", "x"]).exit_code == 0
    assert started[0][2:] == ["--help", "-h", "--out", "x"]
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["stage", "--help"]).output.startswith("Usage: ")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_a_short_help_and_a_version(stage):
    for option, start in (("-h", "Usage: "), ("--version", "kohaku-delta ")):
        assert subprocess.run(
            [sys.executable, f"stages/{stage}", option], cwd=ROOT, capture_output=True, text=True
        ).stdout.startswith(start)


def test_ctrl_c_is_one_line(tmp_path):
    script = "import time, click\nfrom kohaku_delta.cli.stage_command import StageCommand\n"
    script += (
        "@click.command(cls=StageCommand)\ndef main():\n    print('runs', flush=True)\n    time.sleep(60)\nmain()\n"
    )
    (tmp_path / "wait.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        [sys.executable, "wait.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert re.fullmatch(r"Error: Interrupted\..*\n", process.stderr.read())


def test_a_reader_that_stops_reading_ends_a_command_without_a_word():
    code = (
        "import click; from kohaku_delta.cli.stage_command import StageCommand; "
        "click.command(cls=StageCommand)(lambda: [click.echo('x' * 99) for _ in range(100_000)])()"
    )
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -1; echo ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["x" * 99, "141"] and done.stderr == ""


def test_ctrl_c_amid_imports_is_one_line():
    code = "import kohaku_delta, os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and done.stderr == "Error: Interrupted.\n"


@pytest.mark.skipif(not shutil.which("dvc"), reason="dvc is not on PATH")
def test_no_output_can_be_pushed_into_the_embedded_remote_by_accident(tmp_path):
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc" / "config")
    (tmp_path / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  write:\n    cmd: echo our line; echo out > out\n    outs: [out]\n")
    run = {
        "cwd": tmp_path,
        "env": {**os.environ, "DVC_SITE_CACHE_DIR": str(tmp_path / "site")},
        "capture_output": True,
        "text": True,
    }
    assert subprocess.run(["dvc", "repro", "--quiet"], **run).stdout == "our line\n"
    assert subprocess.run(["dvc", "push"], **run).returncode != 0 and not (tmp_path / "miniature").exists()
    assert (
        "remote" not in (ROOT / "data.dvc").read_text()
    )  # at a revision DVC takes its place from the file system's root: `dvc exp push` would write there


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("WHEELS"), reason="WHEELS does not name a folder of wheels (make wheels LOCK=cpu)"
)
def test_a_folder_of_wheels_is_enough_without_a_network(tmp_path):
    words = ["unshare", "--net", "--map-root-user", SCRIPT]
    began = time.monotonic()
    done = subprocess.run(
        words, env={**os.environ, "VENV": str(tmp_path / "venv"), "LOCK": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert subprocess.run(
        [tmp_path / "venv" / "bin" / "kohaku-delta", "--version"], capture_output=True, text=True
    ).stdout, time.monotonic() - began
