"""A build against what somebody signed of another: equal, different, or not to be judged."""

import shutil
import subprocess
from pathlib import Path

import pytest

import rebuild_factory
from kohaku_delta.verify import compare_statement
from tampering import ask, caption, rehash_everything


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    private, public = (tmp_path_factory.mktemp("keys") / name for name in ("key.pem", "key.pub"))
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.fixture(scope="module")
def signed(keys, tmp_path_factory):
    """A finished build, and what its owner signed."""
    folder = rebuild_factory.write(tmp_path_factory.mktemp("theirs") / "recipe")
    assert ask("provenance", folder, "--key", keys[0])[0] == 0
    (folder / "provenance.json").rename(folder.parent / "theirs.json")
    return folder, folder.parent / "theirs.json"


@pytest.fixture
def own(signed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "recipe"
    shutil.copytree(signed[0], folder, symlinks=True)
    return folder


def test_equal_bytes_are_equal_to_what_was_signed(own, signed, keys):
    code, output = ask("compare", own, signed[1], "--key", keys[1])
    assert code == 0 and output.startswith("equal: all 35 outputs of 13 stages have the sha256 that ")
    assert output.count("\n") == 1, output


def test_other_code_with_equal_outputs_is_equal_and_said(own, signed, keys):
    (own / "build" / "code" / "bake.json").write_text("{}")
    code, output = ask("compare", own, signed[1], "--key", keys[1])
    first, second, *_ = output.splitlines()
    assert code == 0 and first.startswith("equal: 34 outputs have the sha256 that ")
    assert second == "  code         other code was run: build/code/bake.json"


@pytest.mark.parametrize("path", sorted(Path("rebuilds").glob("*.json")), ids=lambda path: path.stem)
def test_a_known_rebuild_is_signed_by_its_key_and_its_row_says_what_was_signed(path):
    signed = compare_statement.read_signed(path, path.with_suffix(".pub"))
    (row,) = (line for line in Path("docs/rebuilds.md").read_text().splitlines() if line.startswith(f"| {path.stem} |"))
    assert signed.commit[:10] in row
    assert all(signed.outputs[f"build/{name}.safetensors"] in row for name in ("kohaku-xl-delta", "delta-lokr"))


def test_another_caption_is_told_by_stage_and_output(own, signed, keys):
    caption(own)
    rehash_everything(own)
    code, output = ask("compare", own, signed[1], "--key", keys[1])
    assert code == 1 and output.startswith("different from the stage caption on: build/captions.parquet\n")
    assert "  outputs      1 differ; equal are those of " in output and "caption" not in output.splitlines()[1]


def test_an_output_that_is_not_here_is_not_called_equal(own, signed, keys):
    (own / "build" / "kohaku-xl-delta.safetensors").unlink()
    code, output = ask("compare", own, signed[1], "--key", keys[1])
    assert code == 2 and "not here, so not compared: build/kohaku-xl-delta.safetensors" in output


def test_other_parameters_are_listed(own, signed, keys):
    path = own / "params.yaml"
    path.write_text(path.read_text().replace("seed: ", "seed: 1", 1))
    code, output = ask("compare", own, signed[1], "--key", keys[1])
    assert code == 0 and "  parameter    " in output and "seed: 1" in output


@pytest.mark.parametrize("change", [lambda text: text.replace("a", "b", 1), lambda text: "{}", lambda text: "["])
def test_what_the_key_did_not_sign_is_not_believed(own, signed, keys, tmp_path, change):
    forged = tmp_path / "forged.json"
    forged.write_text(change(signed[1].read_text()))
    code, output = ask("compare", own, forged, "--key", keys[1])
    assert code == 2 and "Nothing in it is trusted." in output


def test_another_key_and_a_missing_one_are_refused(own, signed, keys, tmp_path):
    assert ask("compare", own, signed[1])[0] == 2
    assert ask("compare", own, own, "--key", keys[1])[0] == 2
    other = tmp_path / "other.pub"
    private = tmp_path / "other.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", other], check=True)
    code, output = ask("compare", own, signed[1], "--key", other)
    assert code == 2 and "no signature of" in output
