"""`kohaku-delta pin` fills what the pins leave open, shows it first, and changes nothing else."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from fake_hub import REVISION, STRANGER, trust_fake_hub
from kohaku_delta.cli.pin import pin
from kohaku_delta.dataset import fetch_inputs
from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest, mirror, pins
from kohaku_delta.params import load
from kohaku_delta.preflight import host_facts

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"images/data-{number:04d}.tar" for number in range(4)]
INPUTS = f"""
    one: {{url: hf://owner/model@{REVISION}/one.safetensors, bytes: null, sha256: null}}   # in one line
    small:                    # kept in git, without LFS
      url: hf://owner/model@{REVISION}/vocab.json
      bytes: null
      sha256: null
    tars:   # a comment
      - url: hf://datasets/owner/name/images/data-{{0000..0004}}.tar
        bytes: null           # how many
        sha256: null
    gamma:
      url: file://gamma.safetensors
      bytes: null
      sha256: "38942904e9"
"""


@pytest.fixture
def hub(monkeypatch):
    with trust_fake_hub(monkeypatch) as hub:
        hub.add("owner/model/one.safetensors", b"one" * 1000)
        hub.add("owner/model/vocab.json", b"{}", lfs=False)
        for number, name in enumerate(NAMES):
            hub.add(f"datasets/owner/name/{name}", bytes([number]) * 1000)
        yield hub


@pytest.fixture
def params(tmp_path):
    text = Path("miniature/params.yaml").read_text()
    start, end = text.index("\n    database:"), text.index("\nselection:")
    (tmp_path / "params.yaml").write_text(text[:start] + INPUTS + text[end:])
    return tmp_path / "params.yaml"


def run(params, *options, answer=""):
    return CliRunner().invoke(pin, ["--params", str(params), *options], input=answer)


def test_what_is_open_is_filled_and_every_other_byte_stays(hub, params):
    before = params.read_text()
    done = run(params, "--yes")
    assert done.exit_code == 0, done.output
    pinned = YAML(typ="safe", pure=True).load(params.read_text())["download"]["inputs"]
    assert pinned["one"]["bytes"] == 3000 and pinned["one"]["sha256"] == hashlib.sha256(b"one" * 1000).hexdigest()
    assert pinned["small"] == {"url": f"hf://owner/model@{REVISION}/vocab.json", "bytes": 2, "sha256": None}
    assert pinned["gamma"] == {"url": "file://gamma.safetensors", "bytes": None, "sha256": "38942904e9"}
    listing = (params.parent / "pins-tars.csv").read_bytes()
    rows = list(csv.DictReader(listing.decode().splitlines()))
    assert [tuple(row.values()) for row in rows] == [
        (f"data-{n:04d}.tar", "1000", hashlib.sha256(bytes([n]) * 1000).hexdigest()) for n in range(4)
    ]
    assert pinned["tars"] == [
        {
            "url": f"hf://datasets/owner/name@{REVISION}/images/data-{{0000..0004}}.tar",
            "bytes": 4000,
            "sha256": hashlib.sha256(listing).hexdigest(),
        }
    ]
    changed = [(a, b) for a, b in zip(before.splitlines(), params.read_text().splitlines(), strict=True) if a != b]
    assert len(changed) == 5 and all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)
    load(params)


def test_each_span_of_an_input_has_its_own_list(hub, params):
    for folder, numbers in (("original", (0, 1)), ("recent", (1000, 1001))):
        for number in numbers:
            hub.add(f"datasets/owner/name/{folder}/data-{number:04d}.tar", f"{folder}{number}".encode())
    text = params.read_text()
    start = text.index("hf://datasets/owner/name")
    line = text[text.rindex("\n", 0, start) : text.index("sha256: null", start) + len("sha256: null")]
    spans = ("original/data-{0000..0001}", "recent/data-{1000..1001}")
    params.write_text(text.replace(line, "".join(line.replace("images/data-{0000..0004}", span) for span in spans)))
    assert run(params, "--yes").exit_code == 0
    recipe = load(params)
    found = pins.expand_input("tars", recipe.download.inputs["tars"], params.parent)
    assert [(pin.url.rpartition("@")[2][41:], pin.bytes) for pin in found] == [
        ("original/data-0000.tar", 9), ("original/data-0001.tar", 9), ("recent/data-1000.tar", 10),
        ("recent/data-1001.tar", 10),
    ]  # fmt: skip
    assert found[3].sha256 == hashlib.sha256(b"recent1001").hexdigest()
    assert sorted(path.name for path in params.parent.glob("pins-*")) == ["pins-tars-2.csv", "pins-tars.csv"]


def test_the_change_is_shown_and_written_only_after_a_yes(hub, params):
    before = params.read_text()
    declined = run(params, answer="n\n")
    assert declined.exit_code == 1 and params.read_text() == before and not (params.parent / "pins-tars.csv").exists()
    for word in (
        "-    one: {url",
        f"+      - url: hf://datasets/owner/name@{REVISION}/images",
        "+data-0003.tar,1000,",
        "1 of 5 files do not exist",
        "no sha256 of vocab.json",
        "the revision that the release used is not known",
    ):
        assert word in declined.output
    assert "gamma" in declined.output and "prefix 38942904e9" in declined.output
    assert run(params, answer="").exit_code == 1 and params.read_text() == before
    assert run(params, answer="y\n").exit_code == 0 and params.read_text() != before
    hub.asked.clear()
    again = run(params)
    assert again.exit_code == 0 and "small" in again.output and "written" not in again.output


def test_what_is_pinned_is_never_changed(hub, params):
    text = params.read_text()
    params.write_text(text.replace("one.safetensors, bytes: null", "one.safetensors, bytes: 5"))
    refused = run(params, "--yes")
    assert (
        refused.exit_code == 1 and "the hub lists 3000 bytes" in refused.output and "the pin says 5" in refused.output
    )
    params.write_text(text.replace("model@" + REVISION + "/one", "model@" + "f" * 40 + "/one"))
    refused = run(params, "--yes")
    assert refused.exit_code == 1 and "has no revision ffff" in refused.output


def test_a_filled_recipe_downloads_and_says_how_each_file_was_known(hub, params):
    run(params, "--yes")
    recipe, folder = load(params), params.parent
    entries = mirror.resolve_inputs(recipe.download, folder, {"gamma"})
    inputs_manifest.write(entries, folder, "published", folder / "build" / "inputs.json")
    said = json.loads((folder / "build" / "inputs.json").read_text())
    assert said["start"] == "published"
    assert {name: entry["pinned"] for name, entry in said["inputs"].items() if name != "tars"} == {
        "one": "sha256",
        "small": "recorded",
    }
    assert [entry["pinned"] for entry in said["inputs"]["tars"]] == ["sha256"] * 4
    assert [path.read_bytes()[0] for path in inputs_manifest.paths(folder / "build" / "inputs.json", "tars")] == [
        0,
        1,
        2,
        3,
    ]


def test_a_main_tar_that_the_url_names_and_the_pinned_revision_lacks_is_refused_before_anything_is_fetched(hub, params):
    params.write_text(params.read_text().replace("start: merge ", "start: published "))
    run(params, "--yes")
    hub.asked.clear()
    with pytest.raises(UserError, match="pins-tars.csv does not list data-0004.tar, which .* names"):
        fetch_inputs.fetch_inputs(load(params), params.parent)
    assert not hub.asked
    params.write_text(params.read_text().replace("{0000..0004}", "{0000..0003}"))
    assert len(fetch_inputs.fetch_inputs(load(params), params.parent)["tars"]) == 4


def test_the_confined_download_stage_reads_the_list_of_a_span(params):
    folder = params.parent
    (folder / "images").mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([number]) * 1000)
    listed = pins.format_pin_list(
        [
            (Path(name).name, 1000, hashlib.sha256(bytes([number]) * 1000).hexdigest())
            for number, name in enumerate(NAMES)
        ]
    )
    (folder / "pins-tars.csv").write_bytes(listed)
    span = {"url": "file://images/data-{0000..0003}.tar", "bytes": 4000, "sha256": hashlib.sha256(listed).hexdigest()}
    text = params.read_text()
    end = text.index("\nselection:")
    first = text.index("    one:")
    params.write_text(f"{text[:first]}    tars: {json.dumps([span])}\n{text[end:]}")
    done = subprocess.run([sys.executable, ROOT / "stages" / "download.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "4 files, 4,000 bytes" in done.stdout, done.stdout + done.stderr
    assert host_facts._missing_inputs(load(params), folder) == ()
    (folder / NAMES[2]).unlink()
    assert host_facts._missing_inputs(load(params), folder) == (NAMES[2],)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"1000", b"1001", 1)), "params.yaml pins"),
    ],
)
def test_a_list_that_is_not_the_pinned_one_is_refused(hub, params, damage, sentence):
    run(params, "--yes")
    damage(params.parent / "pins-tars.csv")
    with pytest.raises(UserError, match=sentence):
        mirror.resolve_inputs(load(params).download, params.parent, {"gamma"})


def test_a_refusal_names_no_token(hub, params, monkeypatch):
    hub.gated.add("datasets/owner/name")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    refused = run(params, "--yes")
    assert refused.exit_code == 1 and "not entitled" in refused.output and STRANGER not in refused.output
