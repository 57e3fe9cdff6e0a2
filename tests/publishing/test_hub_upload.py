"""An upload sends a release's files, all of them and nothing else, to the repository that was named, if told to."""

import hashlib
import socket

import pytest
from click.testing import CliRunner
from huggingface_hub import constants, utils

import fake_hub
from kohaku_delta.cli.main import main

FILES = {
    "README.md": b"---\nlibrary_name: diffusers\n---\n# A model\n",
    "bom.json": b"{}",
    "docs/bucket.txt": b"bucket 0\n",
    "model.sig": b"{}",
    "provenance.json": b"{}",
    "kohaku-xl-delta-rev1.safetensors": b"weights" * 1000,
    "lyco-ckpts/kohaku-xl-delta-lyco.safetensors": b"a LoKr" * 500,
    "unet/diffusion_pytorch_model.safetensors": b"a U-Net" * 700,
    "samples/final-00.png": b"a picture" * 30,
}
LARGE = {name for name in FILES if name.endswith((".safetensors", ".png"))}


@pytest.fixture
def recipe(tmp_path):
    for name, data in FILES.items():
        path = tmp_path / "release" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """With an empty repository, me/model, and the token of its owner; large files go the way without hf_xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(utils._http.time, "sleep", lambda seconds: None)
    with fake_hub.trust_fake_hub(monkeypatch) as hub:
        hub.add("me/model/.gitattributes", b"", lfs=False)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield hub


def upload(recipe, *options):
    done = CliRunner().invoke(main, ["upload", str(recipe), *options])
    assert fake_hub.TOKEN not in done.output and fake_hub.STRANGER not in done.output
    assert "signature=" not in done.output and "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def send(recipe, repo="me/model"):
    return upload(recipe, "--repo", repo, "--yes")


@pytest.mark.parametrize("options", [[], ["--repo", "me/model"]])
def test_without_yes_everything_is_listed_and_nothing_asks_the_network(recipe, options, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("the list asks nothing of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    done = upload(recipe, *options)
    assert done.exit_code == 0, done.output
    for name, data in FILES.items():
        assert f"{len(data):,}  {name}\n" in done.output
    total = sum(map(len, FILES.values()))
    assert f"{len(FILES)} files, {total:,} bytes" in done.output and "Nothing was sent" in done.output


def test_a_folder_without_a_signature_is_told(recipe):
    assert "not signed" not in upload(recipe).output
    (recipe / "release" / "model.sig").unlink()
    assert "The folder is not signed: `make proofs`" in upload(recipe).output


def test_the_repository_gets_every_file_and_the_folder_keeps_its_own(recipe, hub):
    before = sorted(recipe.rglob("*"))
    done = send(recipe)
    assert done.exit_code == 0, done.output
    assert [commit["files"] for commit in hub.commits] == [FILES]
    assert sorted(recipe.rglob("*")) == before
    assert f"sent: {hub.url}/me/model/commit/{fake_hub.REVISION}" in done.output


def test_no_token_reaches_the_storage(recipe, hub):
    send(recipe)
    puts = hub.requests("storage")
    assert len(puts) == len(LARGE) and not any(authorization for *_, authorization in puts)


@pytest.mark.parametrize("fault", [403, "drop"])
def test_an_interrupted_upload_goes_on_and_sends_no_large_file_twice(recipe, hub, fault):
    hub.upload_faults = [None, None, *[fault] * 40]
    done = send(recipe)
    assert done.exit_code == 1 and "Run the same command again" in done.output
    assert not hub.commits
    arrived, hub.upload_faults = set(hub.stored), []
    assert arrived
    asked = len(hub.requests("storage"))
    assert send(recipe).exit_code == 0
    again = {path[1:].split("?")[0] for _, _, path, *_ in hub.requests("storage")[asked:]}
    assert not again & arrived
    assert again | arrived == {hashlib.sha256(FILES[name]).hexdigest() for name in LARGE}
    assert hub.commits[-1]["files"] == FILES


def test_a_second_upload_sends_what_changed(recipe, hub):
    send(recipe)
    (recipe / "release" / "docs" / "bucket.txt").write_bytes(b"bucket 1\n")
    assert send(recipe).exit_code == 0
    assert [sorted(commit["files"]) for commit in hub.commits] == [sorted(FILES), ["docs/bucket.txt"]]


@pytest.mark.parametrize(
    "status, sentence",
    [
        (409, "at the same time"),
        (412, "at the same time"),
        (413, "takes no more data"),
        (400, "front matter"),
        (503, "answered 503"),
    ],
)
def test_a_refused_commit_is_a_sentence(recipe, hub, status, sentence):
    hub.commit_faults = [status] * 20
    done = send(recipe)
    assert done.exit_code == 1 and sentence in done.output
    hub.commit_faults = []
    assert send(recipe).exit_code == 0


def test_who_may_not_write_is_told(recipe, hub, monkeypatch):
    assert "does not exist on the Hub" in send(recipe, "me/other").output
    monkeypatch.setenv("HF_TOKEN", fake_hub.STRANGER)
    assert "may not write to me/model (403)" in send(recipe).output
    monkeypatch.setenv("HF_TOKEN", "hf_nobodyAbcdefghijklmnopqrstuvwxyz")
    assert "not valid (401)" in send(recipe).output
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token" in send(recipe).output
    assert not hub.commits


def test_a_hub_that_cannot_be_reached_or_is_none_is_a_sentence(recipe, hub, monkeypatch):
    hub.elsewhere = (404, "")
    assert send(recipe).exit_code == 1
    hub.elsewhere = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in send(recipe).output
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = send(recipe)
    assert done.exit_code == 1 and "Run the same command again" in done.output


def test_what_the_transfer_library_raises_is_a_sentence_too(recipe, hub, monkeypatch, tmp_path):
    """hf_xet speaks a protocol of its own, of which this hub knows nothing: its first request is answered with 404."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    done = send(recipe)
    assert done.exit_code == 1 and "ended with an error of huggingface_hub (" in done.output
    assert "Run the same command again" in done.output and "xet-write-token" not in done.output
    assert any("xet-write-token" in request[2] for request in hub.asked) and not hub.commits


@pytest.mark.parametrize(
    "repo", ["model", "me/model/x", "https://huggingface.co/me/model", "../x", "me/-x", "me/a b", "datasets/me/x"]
)
def test_a_wrong_name_of_a_repository_is_refused_at_once(recipe, repo):
    done = upload(recipe, "--repo", repo)
    assert done.exit_code == 1 and "OWNER/NAME" in done.output


def test_a_folder_that_is_no_release_is_refused(recipe, tmp_path):
    assert "--yes needs --repo" in upload(recipe, "--yes").output
    (recipe / "release" / "docs" / "secret").symlink_to("/etc/hostname")
    assert "is a link" in upload(recipe).output
    (recipe / "release" / "docs" / "secret").unlink()
    (recipe / "release" / "README.md").unlink()
    assert "no README.md" in upload(recipe).output
    assert "does not exist. Run `kohaku-delta release`" in upload(tmp_path / "nothing").output
