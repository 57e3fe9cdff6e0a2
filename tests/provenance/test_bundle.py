"""A bundle is audited like the folder it was made of; edited, re-signed or hostile, it is found out or refused, and
nothing unsigned in it is believed.
"""

import base64
import json
import shutil
import subprocess
import tarfile

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import rebuild_factory
from kohaku_delta.verify import known_code
from tampering import ask, audit, caption, fabricate_output_hash, failed, locked, other_code, sealed


@pytest.fixture(scope="module")
def untampered_rebuild(tmp_path_factory):
    return rebuild_factory.write(tmp_path_factory.mktemp("honest") / "recipe")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two people's keys: (private, public) each."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = Ed25519PrivateKey.generate()
        (folder / name).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (folder / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    return folder


@pytest.fixture
def copy(untampered_rebuild, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "recipe"  # as deep as the honest one: its root is a relative path
    shutil.copytree(untampered_rebuild, folder, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def bundle(untampered_rebuild, keys):
    path = keys / "honest.tar"
    code, message = ask("bundle", path, "--recipe", untampered_rebuild, "--key", keys / "ours")
    assert code == 0, message
    return path


def unpacked(bundle, to):
    with tarfile.open(bundle) as tar:
        tar.extractall(to)  # written by the test itself
    return to


def test_a_bundle_is_audited_like_its_folder_and_its_bytes_do_not_depend_on_the_place(
    untampered_rebuild, bundle, copy, keys
):
    code, found = audit(bundle, "--key", keys / "ours.pub")
    assert (
        code == 0
        and not failed(found)
        and found["lock/provenance"][0] == found["lock/bundle"][0] == found["chain/lokr"][0] == "PASS"
    )
    assert {name for name, (status, _) in found.items() if status == "SKIP"} == {
        "lock/weights",
        "lock/data",
        "lock/revision",
        "chain/selection",
        "chain/captions",
        "chain/statistics",
        "chain/final",
        "chain/diffusers",
        "chain/weights",
        "chain/milestones",
        "lock/work",
        "release/release",
        "replay/steps",
    }
    ask("bundle", copy / "again.tar", "--recipe", copy, "--key", keys / "ours")
    assert (copy / "again.tar").read_bytes() == bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        names = tar.getnames()
        assert not any(name.endswith(".safetensors") for name in names) and {
            member.mtime for member in tar.getmembers()
        } == {0}
    assert {
        "dvc.lock",
        "params.yaml",
        "provenance.json",
        "build/journal.parquet",
        "build/schedule.parquet",
        "build/captions.parquet",
    } <= set(names)


def test_an_edited_bundle_is_found_however_carefully_it_was_edited(bundle, tmp_path, keys):
    folder = unpacked(bundle, tmp_path / "bundle")
    caption(folder)
    assert failed(audit(folder)[1])["lock/bundle"] == "build/captions.parquet was changed after it was packed"
    sealed(folder)
    assert "build/captions.parquet (of caption) has md5" in failed(audit(folder)[1])["lock/outs"]

    def change(stages):
        new = rebuild_factory.hashed(folder / "build" / "captions.parquet")
        for stage in stages.values():
            for place in stage["outs"] + stage["deps"]:
                if place["path"] == "build/captions.parquet":
                    place.update(md5=new["md5"], size=new["size"])

    locked(folder, change)
    sealed(folder)
    found = failed(audit(folder, "--key", keys / "ours.pub")[1])
    assert "build/captions.parquet" in found["lock/records"] or "of another run" in found["lock/records"], found
    assert "was signed with another value than the files here give" in found["lock/provenance"]


@pytest.mark.parametrize("name", ["cpu.txt", "uv.txt"])
def test_another_lock_of_the_libraries_in_a_bundle_is_found(bundle, tmp_path, name):
    """Also where no stage's code reaches what was changed."""
    folder = unpacked(bundle, tmp_path / "bundle")
    with open(folder / "requirements" / name, "a") as file:
        file.write("# another\n")
    sealed(folder)
    assert "is not the one that dvc.lock says the stages ran with" in failed(audit(folder)[1])["lock/libraries"]


def test_weights_that_are_not_in_a_bundle_are_held_by_the_records(bundle, tmp_path):
    folder = unpacked(bundle, tmp_path / "bundle")
    fabricate_output_hash(folder)
    sealed(folder)
    assert (
        "the record of bake is of another run: it wrote build/kohaku-xl-delta.safetensors"
        in failed(audit(folder)[1])["lock/records"]
    )


def test_a_digest_of_a_tensor_that_was_edited_is_refused(bundle, tmp_path):
    folder = unpacked(bundle, tmp_path / "bundle")
    content = json.loads((folder / "tensors.json").read_text())
    next(iter(content["build/delta-base.safetensors"]["tensors"].values()))["sha256"] = "5" * 64
    (folder / "tensors.json").write_text(json.dumps(content))
    code, message = ask("audit", folder)
    assert (
        code == 2
        and "tensors.json: the digest of build/delta-base.safetensors does not follow from its tensors" in message
    )


def test_the_tensors_of_weights_that_are_not_in_a_bundle_are_signed(bundle, tmp_path, keys):
    """Other tensors of the final model, with a list that is consistent in itself."""
    folder = unpacked(bundle, tmp_path / "bundle")
    content = json.loads((folder / "tensors.json").read_text())
    content["build/kohaku-xl-delta.safetensors"] = content["build/delta-base.safetensors"]
    (folder / "tensors.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    sealed(folder)
    assert not failed(audit(folder)[1]), "nobody but the signer knows"
    assert "tensors.json" in failed(audit(folder, "--key", keys / "ours.pub")[1])["lock/provenance"]


def test_a_wrong_key_is_refused_and_an_unnamed_one_believes_nothing(bundle, keys):
    code, found = audit(bundle, "--key", keys / "theirs.pub")
    assert (
        code == 1
        and "no signature of" in failed(found)["lock/provenance"]
        and "Nothing in it is trusted" in failed(found)["lock/provenance"]
    )
    assert audit(bundle)[1]["lock/provenance"] == ("SKIP", "signed, but without --key nothing in it is trusted")
    code, message = ask("provenance", bundle, "--verify", keys / "ours.pub")
    assert code == 0 and "verified: 13 of 13 stages" in message
    assert ask("provenance", bundle, "--verify", keys / "ours")[0] == 2, "a private key is no public one"
    code, message = ask("provenance", bundle, "--key", keys / "ours")
    assert code == 2 and "Sign it when you pack it" in message


@pytest.mark.parametrize("path", ["/nope", "/dev/zero", "/dev/null", "."])
def test_a_key_that_is_none_is_refused_before_any_check_and_read_up_to_a_limit(bundle, untampered_rebuild, path):
    for arguments in (
        ("audit", bundle, "--key", path),
        ("provenance", bundle, "--verify", path),
        ("provenance", untampered_rebuild, "--key", path),
    ):
        code, message = ask(*arguments)
        assert code == 2 and f"{path} " in message and "openssl" in message and "PASS" not in message


def test_a_bundle_of_a_build_that_is_not_whole_says_what_is_missing(copy, tmp_path):
    (copy / "build/journal.parquet").unlink()
    code, message = ask("bundle", tmp_path / "half.tar", "--recipe", copy)
    assert code == 0 and "so not in the bundle: build/journal.parquet" in message


def test_a_bundle_replaces_nothing_but_a_bundle(copy, monkeypatch, tmp_path):
    before = sorted(copy.rglob("*"))
    for place in (copy, copy.parent):
        monkeypatch.chdir(place)
        for out in (".", "..", copy, copy / "build"):
            code, message = ask("bundle", out, "--recipe", copy)
            assert code == 1 and "would be replaced as a whole" in message
    assert sorted(copy.rglob("*")) == before
    out = tmp_path / "bundle"
    assert ask("bundle", out, "--recipe", copy)[0] == 0
    assert ask("bundle", out, "--recipe", copy)[0] == 0, "its own bundle is replaced"
    (out / "notes.txt").write_text("mine")
    code, message = ask("bundle", out, "--recipe", copy)
    assert code == 1 and "notes.txt" in message and (out / "notes.txt").read_text() == "mine"
    code, message = ask("bundle", tmp_path / "mini.tar.gz", "--recipe", copy)
    assert code == 1 and "a bundle is a file .tar, or a folder" in message


def envelope(payload: bytes, key, **more) -> str:
    """A DSSE envelope by its definition, signed by hand."""
    kind = b"application/vnd.in-toto+json"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    signature = private.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    from securesystemslib.signer import SSlibKey

    keyid = SSlibKey.from_crypto(private.public_key()).keyid
    return json.dumps(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind.decode(),
            "signatures": [{"keyid": keyid, "sig": base64.b64encode(signature).decode()}],
        }
        | more
    )


def test_the_provenance_is_what_the_standards_say_and_unknown_fields_are_refused_by_name(bundle, tmp_path, keys):
    folder = unpacked(bundle, tmp_path / "bundle")
    place = folder / "provenance.json"
    content = json.loads(place.read_text())
    payload = base64.b64decode(content["payload"])
    kind = content["payloadType"].encode()
    public = serialization.load_pem_public_key((keys / "ours.pub").read_bytes())
    public.verify(
        base64.b64decode(content["signatures"][0]["sig"]),
        b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload),
    )
    statement = json.loads(payload)
    assert (
        statement["_type"] == "https://in-toto.io/Statement/v1"
        and statement["predicateType"] == "https://slsa.dev/provenance/v1"
    )
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert subjects["build/captions.parquet"] == rebuild_factory.sha256(
        (folder / "build" / "captions.parquet").read_bytes()
    )
    steps = {step["name"]: step for step in statement["predicate"]["buildDefinition"]["internalParameters"]["steps"]}
    products = {each["name"]: each["digest"]["sha256"] for each in steps["caption"]["products"]}
    assert {each["name"]: each["digest"]["sha256"] for each in steps["train"]["materials"]}[
        "build/captions.parquet"
    ] == products["build/captions.parquet"]

    for path, name in (
        (("predicate", "runDetails"), "predicate.runDetails.trusted"),
        (("predicate",), "predicate.trusted"),
        ((), "trusted"),
    ):
        changed = json.loads(payload)
        inner = changed
        for key in path:
            inner = inner[key]
        inner["trusted"] = True
        place.write_text(envelope(json.dumps(changed).encode(), keys / "ours"))
        sealed(folder)
        assert (
            f"provenance.json: {name} was signed with another value"
            in failed(audit(folder, "--key", keys / "ours.pub")[1])["lock/provenance"]
        )
    place.write_text(envelope(payload, keys / "ours", trusted=True))
    sealed(folder)
    assert (
        "the envelope's field 'trusted' is not known"
        in failed(audit(folder, "--key", keys / "ours.pub")[1])["lock/provenance"]
    )
    place.write_text(envelope(payload, keys / "ours"))
    sealed(folder)
    assert audit(folder, "--key", keys / "ours.pub")[1]["lock/provenance"][0] == "PASS", (
        "the same payload, signed by hand"
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("../outside", {}, "is nothing that a bundle holds"),
        ("/etc/outside", {}, "is nothing that a bundle holds"),
        ("build/a/../../../outside", {}, "is nothing that a bundle holds"),
        ("build/link.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is not a plain file"),
        ("build/pipe", {"type": tarfile.FIFOTYPE}, "is not a plain file"),
        ("dvc.lock", {}, "comes twice"),
        ("dvc.lock/inside", {}, "is nothing that a bundle holds"),
        ("build/journal.parquet/inside", {}, "is a file and a folder at once"),
    ],
)
def test_hostile_members_of_a_bundle_are_refused_by_name(bundle, tmp_path, name, change, message):
    hostile = tmp_path / "hostile.tar"
    shutil.copyfile(bundle, hostile)
    with tarfile.open(hostile, "a") as tar:
        member = tarfile.TarInfo(name)
        for key, value in change.items():
            setattr(member, key, value)
        tar.addfile(member)
    code, output = ask("audit", hostile)
    assert code == 2 and message in output and "Traceback" not in output
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dvc.lock", "a: &a [x, x]\nb: [*a, *a]\n", "uses YAML's aliases"),
        ("dvc.lock", "schema: '2.0'\nstages: {}\nextra: 1\n", "extra is not known"),
        ("dvc.lock", "[" * 5000, "is not YAML that can be read"),
        ("bundle.json", "{}", "bundle.json: the key format is missing"),
        ("tensors.json", "[]", "tensors.json: the file's content is []"),
        ("params.yaml", "root: .\n", "is missing"),
    ],
)
def test_hostile_files_of_a_bundle_are_refused_in_a_sentence(bundle, tmp_path, file, content, message):
    folder = unpacked(bundle, tmp_path / "bundle")
    (folder / file).write_text(content)
    if file not in ("bundle.json",):
        sealed(folder)
    code, output = ask("audit", folder)
    assert code == 2 and message in output and "Traceback" not in output, output


def test_a_table_or_journal_that_is_garbage_fails_in_a_sentence(bundle, tmp_path):
    for name in ("journal.parquet", "posts.parquet"):
        folder = unpacked(bundle, tmp_path / name)
        (folder / "build" / name).write_bytes(b"PAR1" + b"\0" * 64 + b"PAR1")
        code, output = ask("audit", folder)
        assert code in (1, 2) and name in output and "Traceback" not in output, output


@pytest.mark.ci
def test_other_code_than_that_at_hand_is_judged_by_the_commit_that_the_records_name(copy, tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(tmp_path / "code"), "-c", "user.name=a", "-c", "user.email=a", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    for name in ("src", "stages"):
        shutil.copytree(
            rebuild_factory.ROOT / name,
            tmp_path / "code" / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    shutil.copyfile(rebuild_factory.ROOT / "dvc.yaml", tmp_path / "code" / "dvc.yaml")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "then")
    commit = git("rev-parse", "HEAD")
    lying_there = git("commit-tree", "-m", "in the repository, and not in its history", "HEAD^{tree}")
    (tmp_path / "code" / "src" / "kohaku_delta" / "errors.py").write_text("# now\n")
    monkeypatch.setattr(known_code, "REPOSITORY", tmp_path / "code")

    def code(change, **facts):
        rebuild_factory.lock(copy)
        rebuild_factory.records(copy, **facts)
        change(copy)
        ask("bundle", copy / "c.tar", "--recipe", copy)
        return audit(copy / "c.tar")[1]["lock/code"]

    status, message = code(lambda folder: None, revision={"commit": commit, "dirty": False})
    assert (
        status == "PASS" and f"those of commit {commit[:10]}" in message and "1 differ from the code at hand" in message
    )
    for unknown in ("0" * 40, lying_there):
        status, message = code(lambda folder: None, revision={"commit": unknown, "dirty": False})
        assert status == "SKIP" and "is not here: check it out" in message
    assert audit(copy)[1]["lock/code"][0] == "SKIP", "the code around a folder is not the auditor's"
    exit_code, output = ask("audit", copy / "c.tar")
    assert exit_code == 2 and "verdict: it cannot be judged without lock/code" in output, output
    rebuild_factory.lock(copy)
    other_code(copy)
    change = rebuild_factory.loaded(copy / "dvc.lock")
    rebuild_factory.records(copy, revision={"commit": commit, "dirty": False})
    rebuild_factory.dump(copy / "dvc.lock", change)
    ask("bundle", copy / "d.tar", "--recipe", copy)
    found = audit(copy / "d.tar")[1]
    assert found["lock/code"] == (
        "FAIL",
        f"src/kohaku_delta/cli/stage_command.py is not what commit {commit[:10]} holds",
    )
