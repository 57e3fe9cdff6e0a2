"""Whatever the hub does, nothing wrong is accepted; what is right arrives in the end, or a sentence says why not."""

import fcntl
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from fake_hub import REVISION, STRANGER, TOKEN, Hub, trust_fake_hub
from kohaku_delta.errors import UserError
from kohaku_delta.hub import mirror
from kohaku_delta.params import Download, Pin

ROOT = Path(__file__).resolve().parents[2]
DATA = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
NAME = "datasets/owner/name/images/data-0001.tar"
PLACE = Path("mirror/dataset/owner/name", REVISION, "images/data-0001.tar")

FAULTS = {  # what the hub does → its faults, what happens: None is "arrives", text is in the sentence that refuses
    "drops the connection midway": ({"faults": ["drop"]}, None),
    "drops it three times": ({"faults": ["drop"] * 3}, None),
    "drops it, then ignores the range": ({"faults": ["drop", "whole"]}, None),
    "ends early": ({"faults": ["short"]}, None),
    "sends too much": ({"faults": ["long"]}, None),
    "sends wrong bytes of the right size": ({"faults": ["corrupt"]}, None),
    "sends wrong bytes every time": ({"faults": ["corrupt"] * 9}, "arrived 3 times with other bytes than its sha256"),
    "sends another file after a drop": ({"faults": ["drop", "other"], "other": OTHER}, None),
    "stalls": ({"faults": ["stall"]}, None),
    "answers 429 for the bytes": ({"faults": [429, 429]}, None),
    "answers 429 to the question": ({"answers": [429, 429]}, None),
    "answers 503 for the bytes": ({"faults": [503, 500]}, None),
    "answers 503 to the question": ({"answers": [503]}, None),
    "answers 503 for ever": ({"answers": [503] * 99}, "answered 503, 12 times in a row"),
    "lets a signed address expire (403)": ({"faults": ["drop", 403]}, None),
    "answers 403 itself": ({"answers": [403]}, r"refused images/data-0001.tar \(403\)"),
}


@pytest.fixture
def hub(monkeypatch):
    with trust_fake_hub(monkeypatch) as hub:
        yield hub


def pin(data=DATA, name=NAME, **changes):
    repo, file = "/".join(name.split("/")[:3]), "/".join(name.split("/")[3:])
    return Pin(
        **(
            {"url": f"hf://{repo}@{REVISION}/{file}", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            | changes
        )
    )


def gather(folder, *other_mirrors, **pinned):
    return mirror.resolve_inputs(
        Download(mirror="mirror", images="all", inputs=pinned), folder, other_mirrors=other_mirrors
    )


def without_stamps(entries):
    return {
        name: [{key: value for key, value in entry.items() if key != "stamp"} for entry in each]
        for name, each in entries.items()
    }


def listed(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("known", ["sha256", "recorded"])
def test_nothing_wrong_is_accepted_and_what_is_right_arrives(hub, tmp_path, fault, known):
    how, sentence = FAULTS[fault]
    hub.add(NAME, DATA, **{key: list(value) if isinstance(value, list) else value for key, value in how.items()})
    wanted = pin() if known == "sha256" else pin(bytes=None, sha256=None)
    if sentence is None:
        entry = gather(tmp_path, tars=[wanted])["tars"][0]
        assert (tmp_path / PLACE).read_bytes() == DATA and listed(tmp_path) == [str(PLACE)]
        assert entry["sha256"] == hashlib.sha256(DATA).hexdigest() and entry["pinned"] == known
    else:
        with pytest.raises(UserError, match=sentence):
            gather(tmp_path, tars=[wanted])
        assert not (tmp_path / PLACE).exists()


def test_small_files_are_checked_against_gits_digest(hub, tmp_path):
    hub.add("owner/model/vocab.json", b'{"a": 1}' * 99, lfs=False, faults=["corrupt", "drop"])
    gather(tmp_path, vocab=Pin(url=f"hf://owner/model@{REVISION}/vocab.json", bytes=None, sha256=None))
    assert (tmp_path / "mirror/model/owner/model" / REVISION / "vocab.json").read_bytes() == b'{"a": 1}' * 99
    hub.add("owner/model/merges.txt", b"a b\n" * 99, lfs=False, faults=["corrupt"] * 9)
    with pytest.raises(UserError, match="arrived 3 times"):
        gather(tmp_path, merges=Pin(url=f"hf://owner/model@{REVISION}/merges.txt", bytes=None, sha256=None))


@pytest.mark.parametrize(
    "changes, word",
    [({"sha256": "0" * 64}, "hub has the sha256"), ({"bytes": 299_999}, "the hub has 300,000 bytes there")],
)
def test_a_file_that_changed_under_its_name_is_refused_before_a_byte_is_fetched(hub, tmp_path, changes, word):
    hub.add(NAME, DATA)
    with pytest.raises(UserError, match=word):
        gather(tmp_path, tars=[pin(**changes)])
    assert hub.requests("storage") == []


def test_a_broken_download_goes_on_where_it_ended(hub, tmp_path):
    hub.add(NAME, DATA, faults=["drop", "drop"])
    gather(tmp_path, tars=[pin()])
    ranges = [int(each[3].removeprefix("bytes=").partition("-")[0]) for each in hub.requests("storage")]
    assert ranges[0] == 0 and 0 < ranges[1] < ranges[2] < len(DATA)


def test_the_part_of_another_file_is_not_gone_on_with(hub, tmp_path):
    (tmp_path / PLACE).parent.mkdir(parents=True)
    (tmp_path / PLACE).with_name(".data-0001.tar.0123456789abcdef.part").write_bytes(OTHER[:1000])
    hub.add(NAME, DATA)
    gather(tmp_path, tars=[pin(sha256=None)])
    assert (tmp_path / PLACE).read_bytes() == DATA and listed(tmp_path) == [str(PLACE)]


def test_a_damaged_file_in_the_mirror_is_told_and_fetched_again(hub, tmp_path, capsys):
    hub.add(NAME, DATA)
    gather(tmp_path, tars=[pin()])
    (tmp_path / PLACE).write_bytes(OTHER)
    gather(tmp_path, tars=[pin()])
    assert (
        tmp_path / PLACE
    ).read_bytes() == DATA and "It is damaged or another file. It is not used." in capsys.readouterr().err


def test_what_is_there_is_used_without_the_network(hub, tmp_path, monkeypatch):
    hub.add(NAME, DATA)
    gather(tmp_path, tars=[pin()])
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    gather(tmp_path, tars=[pin()])
    assert hub.asked == []
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids downloading"):
        gather(tmp_path, tars=[pin(OTHER, NAME.replace("0001", "0002"))])


@pytest.mark.parametrize(
    "token, sentence",
    [
        (None, "is gated.*set HF_TOKEN"),
        (STRANGER, "not entitled"),
        ("hf_expired", "is not valid"),
        ("hf_é", "characters that no token has"),
        ("a b", "characters"),
    ],
)
def test_a_gated_repository_says_what_is_missing(hub, tmp_path, monkeypatch, token, sentence, capfd):
    hub.add(NAME, DATA)
    hub.gated.add("datasets/owner/name")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=sentence) as refusal:
        gather(tmp_path, tars=[pin()])
    assert token is None or token not in refusal.value.message + "".join(capfd.readouterr())


def test_a_token_opens_a_gated_repository_and_is_shown_to_no_other_host(hub, tmp_path, monkeypatch):
    hub.add(NAME, DATA)
    hub.gated.add("datasets/owner/name")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    gather(tmp_path, tars=[pin()])
    assert {each[4] for each in hub.requests("storage")} == {None} and f"Bearer {TOKEN}" in {
        each[4] for each in hub.requests("hub")
    }


def test_two_downloads_never_write_one_file(hub, tmp_path):
    file = hub.add(NAME, DATA)
    part = (tmp_path / PLACE).with_name(f".data-0001.tar.{file.etag[:16]}.part")
    part.parent.mkdir(parents=True)
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another download"):
            gather(tmp_path, tars=[pin()])
    gather(tmp_path, tars=[pin()])
    assert (tmp_path / PLACE).read_bytes() == DATA


def test_no_hub_at_all_is_said(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not be read from \(ConnectError\), 12 times in a row"):
        gather(tmp_path, tars=[pin()])


@pytest.mark.parametrize("claimed", [-5, 299_999, 300_001])
def test_a_hub_that_lies_about_the_size_is_not_believed(hub, tmp_path, claimed):
    hub.add(NAME, DATA, claimed=claimed)
    with pytest.raises(UserError, match="does not give size and hash|12 times in a row|arrived 3 times"):
        gather(tmp_path, tars=[pin(bytes=None, sha256=None)])
    assert not (tmp_path / PLACE).exists()


def test_a_renamed_repository_is_followed_and_the_token_with_it(hub, tmp_path, monkeypatch):
    hub.add(NAME, DATA)
    hub.renamed["datasets/owner/sqlite"] = "datasets/owner/name"
    hub.gated.add("datasets/owner/name")
    with pytest.raises(UserError, match="datasets/owner/sqlite is gated"):
        gather(tmp_path, tars=[pin(name=NAME.replace("name", "sqlite", 1))])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    gather(tmp_path, tars=[pin(name=NAME.replace("name", "sqlite", 1))])
    assert (tmp_path / "mirror/dataset/owner/sqlite" / REVISION / "images/data-0001.tar").read_bytes() == DATA


@pytest.mark.parametrize(
    "url, sentence",
    [
        (
            f"hf://datasets/owner/nobody@{REVISION}/images/data-0001.tar",
            "does not exist, or not for nobody without a token",
        ),
        (f"hf://datasets/owner/name@{'f' * 40}/images/data-0001.tar", "has no revision ffff"),
        (f"hf://datasets/owner/name@{REVISION}/images/none.tar", "has no file images/none.tar"),
        ("hf://datasets/owner/name/images/data-0001.tar", "names no revision.*kohaku-delta pin"),
        (f"hf://datasets/owner/name@{REVISION}/../../x", "leads out of its repository"),
        (f"hf://datasets/owner/..@{REVISION}/x", "leads out of its repository"),
    ],
)
def test_a_pin_of_nothing_is_named(hub, tmp_path, url, sentence):
    hub.add(NAME, DATA)
    with pytest.raises(UserError, match=sentence):
        gather(tmp_path, tars=[Pin(url=url, bytes=None, sha256=None)])


def test_several_files_are_fetched_at_once_and_one_failure_does_not_hold_up_the_rest(hub, tmp_path):
    names = [NAME.replace("0001", f"{number:04d}") for number in range(6)]
    for number, name in enumerate(names):
        hub.add(name, DATA[number:], faults=["corrupt"] * 9 if number == 2 else [0.3])
    with pytest.raises(UserError, match="data-0002.tar arrived 3 times") as refusal:
        gather(tmp_path, tars=[pin(DATA[number:], name) for number, name in enumerate(names)])
    assert hub.most > 1 and "data-0003" not in refusal.value.message
    assert [path[-8:] for path in listed(tmp_path) if not path.endswith(".part")] == [
        f"{number:04d}.tar" for number in (0, 1, 3, 4, 5)
    ]


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(hub, tmp_path):
    hub.add(NAME, DATA, claimed=1 << 60)
    with pytest.raises(
        UserError,
        match=r"1,152,921,504,606,846,976 bytes are still to be downloaded into .*mirror, and [\d,]+ are free",
    ):
        gather(tmp_path, tars=[pin(bytes=None, sha256=None)])
    assert hub.requests("storage") == [] and listed(tmp_path) == []


def test_a_disk_that_fills_up_keeps_what_arrived(tmp_path):
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with Hub() as hub:
        hub.add(NAME, DATA)
        environment = recipe(tmp_path, hub.url, [pin()])
        full = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, preexec_fn=small)
        assert full.returncode == 1 and "The operating system said" in full.stderr and "Traceback" not in full.stderr
        assert not (tmp_path / PLACE).exists() and not (tmp_path / "build" / "inputs.json").exists()
        assert subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
        assert (tmp_path / PLACE).read_bytes() == DATA and hub.requests("storage")[-1][3].startswith("bytes=100000-")


def test_a_hub_that_asks_for_a_day_is_taken_at_its_word(hub, tmp_path):
    hub.retry_after = "86400"
    hub.add(NAME, DATA, faults=["drop", 429])
    with pytest.raises(UserError, match="answered 429 and asks to wait 86400 seconds. What arrived is kept"):
        gather(tmp_path, tars=[pin()])
    assert [path.endswith(".part") for path in listed(tmp_path)] == [True]


def test_another_mirror_is_only_read_and_only_what_agrees_is_linked(hub, tmp_path):
    names = [NAME, NAME.replace("0001", "0002")]
    for name in names:
        hub.add(name, DATA)
    share = tmp_path / "share"
    for name, data in zip(names, (DATA, OTHER), strict=True):
        path = share / PLACE.relative_to("mirror").with_name(name.rsplit("/", 1)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    before = {path: path.stat() for path in share.rglob("*")}
    for path in share.rglob("*"):
        path.chmod(0o555)
    entries = gather(tmp_path, share, tars=[pin(name=name) for name in names])
    assert [each[2].rpartition("/")[2] for each in hub.requests("hub") if each[1] == "GET"] == ["data-0002.tar"]
    assert (
        (tmp_path / PLACE).is_symlink()
        and (tmp_path / PLACE).read_bytes() == DATA
        and (tmp_path / PLACE).with_name("data-0002.tar").read_bytes() == DATA
    )
    assert {path: path.stat().st_mtime_ns for path in before} == {
        path: status.st_mtime_ns for path, status in before.items()
    }
    elsewhere = tmp_path / "elsewhere"
    assert without_stamps(gather(elsewhere, tars=[pin(name=name) for name in names])) == without_stamps(entries), (
        "inputs.json says the same wherever the files came from"
    )


def recipe(folder, hub_url, pins):
    """A params.yaml with these pins, and the environment of a user whose hub is ours."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "miniature" / "params.yaml").read_text())
    content["download"] = {"mirror": "mirror", "images": "all", "inputs": {"tars": [dict(each) for each in pins]}}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(content, file)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    return clean | {"HF_ENDPOINT": hub_url, "HF_HOME": str(folder / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "2"}


COMMAND = [sys.executable, str(ROOT / "stages" / "download.py")]


def test_a_killed_download_resumes_to_the_same_bytes(tmp_path):
    with Hub() as hub:
        hub.add(NAME, DATA, faults=[5.0])
        environment = recipe(tmp_path, hub.url, [pin()])
        process = subprocess.Popen(
            COMMAND, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.time() + 20
        while time.time() < deadline and not any(
            path.stat().st_size > 50_000 for path in (tmp_path / PLACE).parent.glob(".*.part")
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        part = next((tmp_path / PLACE).parent.glob(".*.part"))
        have = part.stat().st_size
        assert (
            50_000 < have < len(DATA)
            and not (tmp_path / PLACE).exists()
            and not (tmp_path / "build" / "inputs.json").exists()
        )
        done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / PLACE).read_bytes() == DATA and hub.requests("storage")[-1][3].startswith(f"bytes={have}-")


def test_the_token_is_in_no_output_no_file_and_no_command_line(tmp_path):
    with Hub() as hub:
        names = [NAME.replace("0001", f"{number:04d}") for number in range(3)]
        for name, faults in zip(names, ([0.8], ["drop"], [503, "corrupt"]), strict=True):
            hub.add(name, DATA, faults=faults)
        hub.gated.add("datasets/owner/name")
        environment = recipe(tmp_path, hub.url, [pin(name=name) for name in names]) | {
            "HF_TOKEN": TOKEN,
            "HF_DEBUG": "1",
        }
        process = subprocess.Popen(
            COMMAND, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        time.sleep(0.5)
        lines = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path))
        said = process.communicate()[0]
        assert process.returncode == 0 and b"stages/download.py" in lines and TOKEN.encode() not in lines + said
        hub.gated.add("datasets/owner/name")
        denied = subprocess.run(
            COMMAND, cwd=tmp_path, env=environment | {"HF_TOKEN": STRANGER}, capture_output=True, text=True
        )
        assert STRANGER not in denied.stdout + denied.stderr
        assert not any(
            secret in path.read_bytes()
            for path in tmp_path.rglob("*")
            if path.is_file()
            for secret in (TOKEN.encode(), b"signature=secret")
        )
        written = json.loads((tmp_path / "build" / "inputs.json").read_text())
        assert [entry["path"] for entry in written["inputs"]["tars"]] == [
            "../" + str(PLACE.with_name(name.rsplit("/", 1)[1])) for name in names
        ]


def _readable(path):
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
