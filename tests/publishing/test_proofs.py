"""A release proves itself in standard forms: each is as its own tool wants it, and the audit agrees with the tools."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import build_factory
import rebuild_factory
from kohaku_delta.cli.main import main
from kohaku_delta.publishing import bill_of_materials
from tampering import audit, failed

TOOLS = rebuild_factory.ROOT / ".venv-proofs" / "bin"
needs_tools = pytest.mark.skipif(
    not (TOOLS.parent / "requirements.txt").exists(), reason="`make proofs-tools` installs the tools (.venv-proofs)"
)
SINGLE = {"final": "kohaku-xl-delta-rev1.safetensors", "bucket": "docs/bucket.txt", "card": "README.md"}
VERIFY = """
import sys
from pathlib import Path
import model_signing
for folder in sys.argv[2:]:
    try:
        verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=Path(sys.argv[1]))
        verifier.set_hashing_config(model_signing.hashing.Config().set_ignored_paths(
            paths=[Path(folder, "model.sig")], ignore_git_paths=True))
        verifier.verify(Path(folder), Path(folder, "model.sig"))
        print(True)
    except Exception:
        print(False)
"""  # what `model_signing verify key` does, for several folders in one process


def write_build(folder: Path) -> Path:
    """A finished build with content that the card can read."""
    rebuild_factory.write(folder)
    losses = {name: {"loss": {"sdxl": loss, "training": loss}} for name, loss in (("base", 0.5), ("final", 0.25))}
    for name, text in {
        "dataset.json": json.dumps(build_factory.DATASET),
        "held-out.json": json.dumps({"posts": 3, **losses}),
        "curves.csv": "step,loss,gradient_norm,learning_rate_unet,learning_rate_text\n0,0.5,0.1,0.01,0.01\n",
        "milestones.csv": "step,held_out_loss,held_out_loss_training\n0,0.5,0.5\n4,0.25,0.25\n",
    }.items():
        (folder / "build" / name).write_text(text)
    rebuild_factory.lock(folder)
    rebuild_factory.records(folder)
    return folder


def make(folder: Path, *options):
    return CliRunner().invoke(main, ["release", str(folder), *map(str, options)])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("proofs")


@pytest.fixture(scope="module")
def keys(place) -> tuple[Path, Path]:
    """Private and public key of the signer."""
    return write_keys(place / "key.pem")


def write_keys(private: Path, *kind: str) -> tuple[Path, Path]:
    public = private.with_suffix(".pub")
    kind = kind or ("EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    subprocess.run(["openssl", "genpkey", "-quiet", "-algorithm", *kind, "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.fixture(scope="module")
def recipe(place, keys) -> Path:
    """A build with its release, whose provenance is signed."""
    folder = write_build(place / "recipe")
    done = make(folder, "--key", keys[0])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def other_build(place, keys) -> Path:
    """Another build of the same signer: one output has another byte."""
    folder = place / "other"
    shutil.copytree(place / "recipe", folder)
    (folder / "build" / "artists-kxl-delta.json").unlink()  # the release's file is a link to it
    (folder / "build" / "artists-kxl-delta.json").write_text("{}")
    rebuild_factory.lock(folder)
    rebuild_factory.records(folder)
    assert make(folder, "--key", keys[0]).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def signed(place, recipe, keys) -> Path:
    """The release as a stranger has it: signed as a whole, downloaded to another folder, with the Hub's own file."""
    folder = place / "downloaded"
    shutil.copytree(recipe / "release", folder)
    sign(folder, keys[0])
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return folder


def sign(folder: Path, key: Path) -> None:
    options = ["--private_key", key, "--signature", folder / "model.sig"]
    subprocess.run([TOOLS / "model_signing", "sign", "key", folder, *options], check=True, capture_output=True)


@pytest.fixture
def unsigned(recipe, tmp_path) -> Path:
    """A copy of the release without a signature of the whole."""
    return shutil.copytree(recipe / "release", tmp_path / "downloaded")


def read(folder: Path, name: str = "bom.json"):
    return json.loads((folder / name).read_text())


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit_bom(folder: Path, change) -> None:
    """The careful forger: the serial number fits the new content."""
    content = read(folder)
    change({each["bom-ref"]: each for each in content["components"]})
    write_json(folder / "bom.json", content | {"serialNumber": bill_of_materials.serial_number(content)})


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


# What the files say


def test_the_bill_of_materials_lists_every_file_input_table_and_library(recipe):
    release, content = recipe / "release", read(recipe / "release")
    parts = {each["bom-ref"]: each for each in content["components"]}
    hashes = {ref: each["hashes"][0]["content"] for ref, each in parts.items() if "hashes" in each}
    files = {path.relative_to(release).as_posix(): sha256(path) for path in release.rglob("*") if path.is_file()}
    for name in ("bom.json", "provenance.json"):
        del files[name]
    assert {ref.removeprefix("file:"): digest for ref, digest in hashes.items() if ref.startswith("file:")} == files
    inputs = read(recipe / "build", "inputs.json")["inputs"]
    assert {hashes["input:0"], hashes["input:1"]} == {inputs["database"]["sha256"], inputs["tars"][0]["sha256"]}
    tables = {each["name"]: each["hashes"][0]["content"] for each in parts["dataset"]["components"]}
    assert len(tables) == 5 and all(digest == sha256(recipe / name) for name, digest in tables.items())
    libraries = {each["name"]: each["version"] for each in parts.values() if each["type"] == "library"}
    assert {"torch", "safetensors", "pyarrow"} <= libraries.keys()
    assert all(metadata.version(name) == version for name, version in libraries.items())
    model = content["metadata"]["component"]["modelCard"]
    assert [each["value"] for each in model["quantitativeAnalysis"]["performanceMetrics"]] == ["0.5", "0.25"]


def test_the_dataset_is_described_as_pyarrow_reads_it(recipe):
    content = read(recipe / "release", "croissant.json")
    record_sets = {each["name"]: each for each in content["recordSet"]}
    for file in content["distribution"]:
        table = pq.read_table(recipe / file["contentUrl"])
        described = record_sets[file["name"].removesuffix(".parquet")]
        assert file["sha256"] == sha256(recipe / file["contentUrl"])
        assert file["contentSize"] == f"{(recipe / file['contentUrl']).stat().st_size} B"
        assert described["description"].startswith(f"{table.num_rows:,} rows.")
        assert [field["source"]["extract"]["column"] for field in described["field"]] == table.column_names
        for field, column in zip(described["field"], table.schema, strict=True):
            plain = str(column.type).removeprefix("list<element: ").removesuffix(">")
            assert field["dataType"] == {"string": "sc:Text"}.get(plain, f"cr:{plain.capitalize()}")
            assert field.get("repeated", False) == str(column.type).startswith("list<")
    assert "11 posts selected; 9 trained on in 5 steps; dropped as deleted: 1" in content["description"]


def test_no_caption_and_no_path_of_the_host_is_published(recipe):
    captions = pq.read_table(recipe / "build" / "captions.parquet")["caption"].to_pylist()
    for path in (recipe / "release").rglob("*.json"):
        text = path.read_text()
        assert not any(caption in text for caption in captions) and str(recipe.parent) not in text, path
    assert not list((recipe / "release").rglob("*.parquet"))


def test_two_people_get_the_same_bytes_except_for_the_signatures(recipe, place):
    other = write_build(place / "elsewhere")
    assert make(other).exit_code == 0
    names = {path.relative_to(other / "release") for path in (other / "release").rglob("*") if path.is_file()}
    assert all((other / "release" / name).read_bytes() == (recipe / "release" / name).read_bytes() for name in names)
    mine = {path.relative_to(recipe / "release") for path in (recipe / "release").rglob("*") if path.is_file()}
    assert mine - names == {Path("provenance.json")}


def test_what_the_card_refers_to_is_in_the_folder(recipe):
    card = (recipe / "release" / "README.md").read_text()
    assert "| tars |" in card and "`bom.json`" in card and "`croissant.json`" in card and "inputs.json" not in card


# Signing


@needs_tools
def test_a_signed_release_is_made_again_and_it_is_said_that_the_signatures_are_gone(recipe, keys):
    sign(recipe / "release", keys[0])
    assert audit(recipe / "release", "--key", keys[1])[0] == 0
    done = make(recipe)
    assert done.exit_code == 0 and "(provenance.json, model.sig): `make proofs` signs it again" in done.output
    assert not (recipe / "release" / "model.sig").exists()
    assert make(recipe, "--key", keys[0]).exit_code == 0


@pytest.mark.parametrize("kind", [("ed25519",), ("RSA",), ("EC", "-pkeyopt", "ec_paramgen_curve:secp256k1")])
def test_a_key_that_model_signing_cannot_use_is_refused_before_anything_is_made(recipe, tmp_path, kind):
    before = (recipe / "release").stat().st_mtime_ns
    done = make(recipe, "--key", write_keys(tmp_path / "key.pem", *kind)[0])
    assert done.exit_code == 1 and "ec_paramgen_curve:P-256" in done.output
    assert (recipe / "release").stat().st_mtime_ns == before


def test_a_build_without_records_is_not_signed(recipe, tmp_path, keys):
    folder = shutil.copytree(recipe, recipe.parent / "unrecorded")
    shutil.rmtree(folder / "build" / "records")
    done = make(folder, "--key", keys[0])
    assert done.exit_code == 1 and "no stage left a record" in done.output


# The audit


def test_a_release_without_a_key_passes_and_nothing_signed_is_believed(recipe, unsigned):
    code, found = audit(recipe / "release")
    assert code == 0 and found["folder/build"][0] == "PASS" and found["folder/provenance"][0] == "SKIP"
    assert "without --key" in found["folder/provenance"][1]
    code, found = audit(unsigned)
    assert code == 0 and found["folder/build"] == ("SKIP", "there is no build beside the folder")


@pytest.mark.parametrize(
    "name", [*SINGLE.values(), "samples/final-00.png", "unet/diffusion_pytorch_model.safetensors", "croissant.json"]
)
def test_a_changed_file_a_missing_and_an_additional_one_are_named(unsigned, name):
    flip(unsigned / name)
    assert f"{name} has the sha256" in failed(audit(unsigned)[1])["folder/files"]
    (unsigned / name).unlink()
    (unsigned / "unet" / "more.bin").write_text("more")
    faults = failed(audit(unsigned)[1])["folder/files"]
    assert f"{name} is missing" in faults and "unet/more.bin is not in bom.json" in faults


@pytest.mark.parametrize("name", ["bom.json", "croissant.json"])
def test_a_missing_or_broken_description_fails(unsigned, name):
    for content in (b"[]", b"{", b"[" * 100_000, b'{"components": [1]}', b"\xff"):
        (unsigned / name).write_bytes(content)
        assert any(name in fault for fault in failed(audit(unsigned)[1]).values()), content
    (unsigned / name).unlink()
    assert any(f"{name} is missing" in fault for fault in failed(audit(unsigned)[1]).values())


def test_a_bill_of_materials_that_says_another_hash_is_found_at_its_entry(unsigned, recipe):
    edit_bom(unsigned, lambda parts: parts["file:docs/bucket.txt"]["hashes"][0].update(content="0" * 64))
    assert "docs/bucket.txt has the sha256" in failed(audit(unsigned)[1])["folder/files"]
    shutil.copy(recipe / "release" / "bom.json", unsigned)
    edit_bom(unsigned, lambda parts: parts["input:1"]["hashes"][0].update(content="0" * 64))
    assert "data-0004.tar (0000000000000000…) is only in bom.json" in failed(audit(unsigned)[1])["folder/bom"]
    shutil.copy(recipe / "release" / "bom.json", unsigned)
    edit_bom(unsigned, lambda parts: parts["dataset"]["components"][0]["hashes"][0].update(content="0" * 64))
    faults = failed(audit(unsigned)[1])
    assert "build/selection.parquet" in faults["folder/bom"] and "build/selection.parquet" in faults["folder/dataset"]


def test_a_library_edited_in_the_bill_of_materials_does_not_fit_its_serial_number_nor_the_build(recipe, keys):
    kept = (recipe / "release" / "bom.json").read_bytes()
    try:
        write_json(recipe / "release" / "bom.json", read(recipe / "release") | {"version": 2})
        assert "serial number" in failed(audit(recipe / "release")[1])["folder/bom"]
        edit_bom(recipe / "release", lambda parts: parts["kohaku-delta"].update(name="another"))
        assert failed(audit(recipe / "release")[1]).keys() == {"folder/build"}
    finally:
        (recipe / "release" / "bom.json").write_bytes(kept)


def test_a_description_with_another_hash_is_found_also_when_the_bill_follows(unsigned):
    content = read(unsigned, "croissant.json")
    content["distribution"][2]["sha256"] = "0" * 64
    write_json(unsigned / "croissant.json", content)
    digest = sha256(unsigned / "croissant.json")
    edit_bom(unsigned, lambda parts: parts["file:croissant.json"]["hashes"][0].update(content=digest))
    assert "build/posts.parquet has the sha256 0000" in failed(audit(unsigned)[1])["folder/dataset"]


def test_a_table_that_both_descriptions_leave_out_is_missed(unsigned):
    content = read(unsigned, "croissant.json")
    del content["distribution"][2]
    write_json(unsigned / "croissant.json", content)
    digest = sha256(unsigned / "croissant.json")

    def change(parts):
        parts["file:croissant.json"]["hashes"][0].update(content=digest)
        del parts["dataset"]["components"][2]

    edit_bom(unsigned, change)
    assert failed(audit(unsigned)[1]) == {"folder/bom": "build/posts.parquet is not in bom.json"}


def test_a_build_that_went_on_beside_the_folder_is_no_fault_of_the_folder(recipe, tmp_path):
    folder = shutil.copytree(recipe, recipe.parent / "went on")
    (folder / "build" / "curves.csv").write_text("another run")
    status, message = audit(folder / "release")[1]["folder/build"]
    assert status == "SKIP" and "cannot be compared" in message


@pytest.mark.parametrize("with_key", [True, False])
def test_the_provenance_of_another_build_names_the_file_that_it_does_not_fit(unsigned, other_build, keys, with_key):
    shutil.copy(other_build / "release" / "provenance.json", unsigned)
    faults = failed(audit(unsigned, *(("--key", keys[1]) if with_key else ()))[1])
    assert faults["folder/provenance"].startswith("docs/artists-kxl-delta.json is not build/artists-kxl-delta.json as")


def test_a_key_that_did_not_sign_fails(unsigned, tmp_path):
    faults = failed(audit(unsigned, "--key", write_keys(tmp_path / "other.pem")[1])[1])
    assert "no signature of" in faults["folder/provenance"] and "not signed" in faults["folder/signature"]


def hostile(kind: str, folder: Path) -> str:
    """Puts something into the folder that no release holds; returns its name."""
    path = folder / "docs" / "trap"
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "link to a folder":
        path.symlink_to("/")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "name":
        os.close(os.open(os.fsencode(path) + b"\xff", os.O_CREAT | os.O_WRONLY))
    elif kind == "large":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "deep":
        path = path.joinpath(*"abcdefghijklmnopqrstuvwxyz")
        path.mkdir(parents=True)
    return "docs/trap"


@pytest.mark.parametrize("kind", ["link", "link to a folder", "pipe", "name", "large", "deep"])
def test_what_no_release_holds_is_named_and_not_opened(unsigned, kind):
    name = hostile(kind, unsigned)
    code, found = audit(unsigned)
    assert code == 1 and list(found) == ["folder/files"] and name in found["folder/files"][1]


def test_options_that_need_a_build_are_refused(unsigned):
    done = CliRunner().invoke(main, ["audit", str(unsigned), "--stages"])
    assert done.exit_code == 2 and "is a published folder: --stages needs a recipe's folder" in done.output


# The standard tools


def validate(folder: Path) -> subprocess.CompletedProcess:
    script = rebuild_factory.ROOT / "tools" / "validate_proofs.py"
    return subprocess.run([TOOLS / "python", script, folder], capture_output=True, text=True)


@needs_tools
def test_the_tools_of_cyclonedx_and_croissant_accept_them_and_not_others(unsigned):
    done = validate(unsigned)
    assert done.returncode == 0, done.stderr
    text = (unsigned / "bom.json").read_text()
    (unsigned / "bom.json").write_text(text.replace('"SHA-256"', '"SHA-257"', 1))
    text = (unsigned / "croissant.json").read_text()
    (unsigned / "croissant.json").write_text(text.replace('"cr:FileObject"', '"cr:FileObjecu"', 1))
    done = validate(unsigned)
    assert done.returncode == 1 and "bom.json: " in done.stderr and "croissant.json: " in done.stderr


def in_signature(folder: Path, *keys, value) -> None:
    content = read(folder, "model.sig")
    target = functools.reduce(lambda part, key: part[key], keys[:-1], content)
    target[keys[-1]] = value(target[keys[-1]])
    write_json(folder / "model.sig", content)


TAMPERED = {
    "honest": lambda folder: None,
    "one byte of the weights": lambda folder: flip(folder / SINGLE["final"]),
    "one byte of the card": lambda folder: flip(folder / "README.md"),
    "one byte of the bill of materials": lambda folder: flip(folder / "bom.json"),
    "one byte of the provenance": lambda folder: flip(folder / "provenance.json"),
    "a missing file": lambda folder: (folder / "docs" / "bucket.txt").unlink(),
    "an additional file": lambda folder: (folder / "more.bin").write_text("more"),
    "a link": lambda folder: (folder / "more.bin").symlink_to("README.md"),
    "the Hub's cache": lambda folder: ((folder / ".cache").mkdir(), (folder / ".cache" / "x").write_text("x")),
    "no signature": lambda folder: (folder / "model.sig").unlink(),
    "an empty signature": lambda folder: (folder / "model.sig").write_text("{}"),
    "another key's hint": lambda folder: in_signature(
        folder, "verificationMaterial", "publicKey", "hint", value=lambda hint: hint[:-1] + "x"
    ),
    "one byte of the payload": lambda folder: in_signature(
        folder, "dsseEnvelope", "payload", value=lambda text: text[:40] + ("A" if text[40] != "A" else "B") + text[41:]
    ),
    "one byte of the signature": lambda folder: in_signature(
        folder,
        "dsseEnvelope",
        "signatures",
        0,
        "sig",
        value=lambda text: text[:20] + ("A" if text[20] != "A" else "B") + text[21:],
    ),
    "another media type": lambda folder: in_signature(folder, "mediaType", value=lambda kind: kind + "x"),
}


@needs_tools
def test_the_audit_says_of_a_signed_folder_what_model_signing_says(signed, keys, tmp_path):
    folders = {}
    for number, (name, change) in enumerate(TAMPERED.items()):
        folders[name] = shutil.copytree(signed, tmp_path / str(number), copy_function=os.link)
        for path in ("bom.json", "README.md", "provenance.json", "model.sig", SINGLE["final"]):
            data = (signed / path).read_bytes()
            (folders[name] / path).unlink()
            (folders[name] / path).write_bytes(data)
        change(folders[name])
    done = subprocess.run([TOOLS / "python", "-c", VERIFY, keys[1], *folders.values()], capture_output=True, text=True)
    verdicts = dict(zip(folders, done.stdout.split(), strict=True))
    assert verdicts == {name: str(name == "honest") for name in TAMPERED}, done.stderr
    for name, folder in folders.items():
        code, found = audit(folder, "--key", keys[1])
        assert (code == 0) == (verdicts[name] == "True"), (name, found)
        assert name == "honest" or name in ("a link",) or "folder/signature" in failed(found), (name, found)


@needs_tools
def test_a_stranger_who_signs_again_is_found_by_the_key(signed, place, tmp_path, keys):
    folder = shutil.copytree(signed, tmp_path / "forged")
    sign(folder, write_keys(tmp_path / "forger.pem")[0])
    assert "was signed by another key" in failed(audit(folder, "--key", keys[1])[1])["folder/signature"]
