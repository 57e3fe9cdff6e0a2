"""What a stage's process loaded is compared with the files that wheels installed, and whatever else ran is named."""

import base64
import hashlib
import json
import os
import subprocess
import sys

import pytest

import rebuild_factory
from kohaku_delta.provenance import import_closure, loaded_code

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import toy, stray
from pathlib import Path
from kohaku_delta.provenance import loaded_code
print(json.dumps(loaded_code.describe(["toy"], Path(sys.argv[1]).parent)))
"""


def row(name: str, content: bytes) -> str:
    return f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},1"


@pytest.fixture
def site(tmp_path):
    """A folder with an installed library, a module of nobody and a sitecustomize."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy.py").write_text("x = 1\n")
    (site / "stray.py").write_text("x = 1\n")
    (site / "sitecustomize.py").write_text("x = 1\n")
    (site / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    added = ["toy-1.0.dist-info/INSTALLER,,", "../../bin/toy,sha256=AAAA,1", "__pycache__/toy.pyc,,"]
    listed = [row("toy.py", b"x = 1\n"), *added]
    (site / "toy-1.0.dist-info" / "RECORD").write_text("\n".join(listed) + "\n")
    return site


def described(site, **environment) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rebuild_factory.ROOT / "src")],
        env={name: value for name, value in os.environ.items() if name not in loaded_code.VARIABLES}
        | {"PYTHONPATH": str(site)}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_what_was_loaded_is_described(site):
    found = described(site, LD_PRELOAD="libc.so.6")
    assert found["changed"] == [] and found["records"] == {
        "toy": hashlib.sha256(f"{hashlib.sha256(b'x = 1' + bytes([10])).hexdigest()}  toy.py\n".encode()).hexdigest()
    }
    assert {"stray", "sitecustomize"} <= set(found["foreign"]) and "toy" not in found["foreign"]
    assert found["startup"] == ["sitecustomize"] and found["variables"] == ["LD_PRELOAD", "PYTHONPATH"]
    assert "click" in found["others"] and str(site) not in json.dumps(found)


def test_a_file_that_was_edited_after_its_installation_is_named(site):
    (site / "toy.py").write_text("x = 2\n")
    assert described(site)["changed"] == ["toy: toy.py"]


def test_the_recorded_lists_are_those_of_the_locked_libraries():
    folder = rebuild_factory.ROOT / "requirements"
    locked = import_closure.locked_libraries(folder / "cpu.txt")
    recorded = import_closure.read_records(folder / "cpu.records.json")
    installed = loaded_code.record_digests(locked)
    assert recorded.keys() == locked.keys() and {name: recorded[name] for name in installed} == installed
