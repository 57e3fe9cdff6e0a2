"""The container's promises that need no container: `make image-check` builds and runs one."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kohaku_delta.training import rank_processes

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = [
    line for line in re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).splitlines() if line
]


def arguments(keyword: str) -> list[str]:
    """The arguments of each such instruction of the Dockerfile, in order."""
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE if line.split()[0] == keyword]


def final(keyword: str) -> list[str]:
    """The same, of the last stage."""
    start = max(place for place, line in enumerate(DOCKERFILE) if line.startswith("FROM"))
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE[start:] if line.split()[0] == keyword]


def commands() -> list[list[str]]:
    return [shlex.split(command) for run in arguments("RUN") for command in re.split(r"&&|;", run)]


def test_the_base_is_named_by_its_digest_and_no_other_image_is_pulled():
    assert re.fullmatch(r"BASE=\S+:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", arguments("ARG")[0])
    assert {each.split()[0] for each in arguments("FROM")} == {"scratch", "${BASE}"}


def test_everything_that_pip_installs_from_outside_is_hashed():
    installs = [words for words in commands() if any(word.endswith("pip") for word in words) and "install" in words]
    outside = [words for words in installs if words[-2:] != ["--editable", "."]]
    assert len(outside) == 2 and all({"--require-hashes", "--no-deps"} <= set(words) for words in outside)
    assert all(
        {"--no-index", "--no-deps", "--no-build-isolation"} <= set(words) for words in installs if words not in outside
    )
    assert all("--no-compile" in words for words in installs), "bytecode may differ from build to build"


@pytest.mark.parametrize(
    "lock",
    [
        "container/init.txt",
        "requirements/cpu.txt",
        "requirements/cuda.txt",
        "requirements/lint.txt",
        "requirements/uv.txt",
    ],
)
def test_each_line_of_a_lock_has_a_version_and_a_hash(lock):
    text = re.sub(r"^#.*\n", "", (ROOT / lock).read_text(), flags=re.M)
    for requirement in re.sub(r"\\\n", " ", text).splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+==\S+(\s+--hash=sha256:[0-9a-f]{64})+", requirement), requirement[:80]


def test_no_other_tool_fetches_anything():
    words = {os.path.basename(word) for command in commands() for word in command}
    assert not words & {"apt", "apt-get", "apk", "curl", "wget", "git", "npm", "conda"} and not arguments("ADD")


def test_the_container_runs_as_another_user_than_root():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final("USER")[-1])


def test_the_image_says_which_revision_and_which_lock_it_holds():
    labels = " ".join(final("LABEL"))
    assert (
        'org.opencontainers.image.revision="${REVISION}"' in labels
        and 'kohaku-delta.lock.sha256="${LOCK_SHA256}"' in labels
    )


def test_nothing_runs_in_the_final_stage():
    assert not final("RUN"), "what a command leaves there (logs, caches, times) differs from build to build"


def test_the_init_hands_sigterm_to_the_whole_group_as_sigint():
    assert final("ENTRYPOINT") == ['["dumb-init", "--rewrite", "15:2", "--"]'] and not final("STOPSIGNAL")
    assert (int(signal.SIGTERM), int(signal.SIGINT)) == (15, 2)


def test_dvc_outlives_a_stage_that_saves_on_sigint(tmp_path):
    saves = "signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.5), open('saved', 'w').close(), sys.exit(1)))"
    (tmp_path / "stage.py").write_text(
        f"import signal, sys, time\n{saves}\nopen('runs', 'w').close()\ntime.sleep(60)\n"
    )
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  train:\n    cmd: {sys.executable} stage.py\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
    )
    environment = {**os.environ, "DVC_SITE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "dvc", "repro", "-q"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    ) as dvc:
        while not (tmp_path / "runs").exists():
            assert dvc.poll() is None
            time.sleep(0.05)
        os.killpg(dvc.pid, signal.SIGINT)
        assert dvc.wait(30) > 0, "DVC says that the stage failed; it did not die of the signal"
    assert (tmp_path / "saved").exists()


def test_compose_gives_two_gpus_shared_memory_and_longer_than_the_launcher_waits():
    service = YAML(typ="safe", pure=True).load(ROOT / "compose.yaml")["services"]["recipe"]
    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    ]
    assert int(service["shm_size"].removesuffix("gb")) >= 1 and "user" in service
    assert 60 * int(service["stop_grace_period"].removesuffix("m")) > rank_processes.PATIENCE
    assert {volume.split(":")[-1] for volume in service["volumes"]} == {"/recipe", "/recipe/mirror", "/recipe/work"}


def test_the_miniatures_copy_holds_all_that_the_pipeline_names():
    script = (ROOT / "container" / "miniature.sh").read_text()
    named = set(re.findall(r"\$\{root\}/(\w+)", (ROOT / "dvc.yaml").read_text()))
    assert named and all(f"$recipe/{folder}" in script for folder in named)


CHANGES = [
    {"mode": 0o755},
    {"mtime": 8},
    {"uid": 7},
    {"name": "other"},
    {"content": b"other"},
    {"type": tarfile.SYMTYPE, "linkname": "elsewhere"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_two_file_systems_that_differ_have_different_listings(change):
    def listing(*files: dict) -> str:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for file in files:
                member = tarfile.TarInfo(file["name"])
                for key, value in {"mode": 0o644, "mtime": 7, **file}.items():
                    if key != "content":
                        setattr(member, key, value)
                content = file["content"] if member.isreg() else b""
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return subprocess.run(
            [sys.executable, "container/listing.py"], input=buffer.getvalue(), stdout=subprocess.PIPE, check=True
        ).stdout.decode()

    one, two = {"name": "one", "content": b"bytes"}, {"name": "two", "content": b"bytes"}
    assert listing(one, two) == listing(two, one) != listing(one, two | change)
