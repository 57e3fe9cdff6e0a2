"""No false alarm: honest rebuilds as they lie about, on other disks, of other users, restored, moved or checked out in
another way, are audited with exit code 0 and without a FAIL.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rebuild_factory
from kohaku_delta.provenance import artifact
from tampering import ask, audit, failed

ROOT = rebuild_factory.ROOT
OTHER_USER = 12345
FOLDERS = ("diffusers", "milestones", "samples", "statistics", "code")
AUDIT = "from kohaku_delta.cli.main import main; main(['audit', *sys.argv[1:], '--json'])"


@pytest.fixture(scope="module")
def honest_rebuild(tmp_path_factory):
    return rebuild_factory.write(tmp_path_factory.mktemp("honest") / "recipe")


@pytest.fixture
def copy(honest_rebuild, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variant") / "recipe"
    shutil.copytree(honest_rebuild, folder)
    return folder


def outs(folder: Path) -> list[Path]:
    """Every file of every output."""
    files = [path for path in sorted((folder / "build").rglob("*")) if path.is_file()]
    return [path for path in files if not path.is_relative_to(folder / "build" / "records")]


def cached(path: Path, cache: Path) -> Path:
    """The place of a file's bytes in DVC's cache, protected as DVC does."""
    md5 = rebuild_factory.hashed(path)["md5"]
    place = cache / "files" / "md5" / md5[:2] / md5[2:]
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        place.chmod(0o444)
    return place


def linked_to_a_cache(link, relative=False, cache="cache"):
    """`cache.type` symlink or hardlink: every file of every output, those of folders too."""

    def vary(folder):
        for path in outs(folder):
            place = cached(path, folder.parent / cache)
            path.unlink()
            link(os.path.relpath(place, path.parent) if relative else place, path)

    return vary


def cache_behind_a_link(folder):
    (folder.parent / "disk").mkdir()
    (folder.parent / "cache").symlink_to("disk")
    linked_to_a_cache(os.symlink)(folder)


def moved(name):
    """A folder that lies on another disk, with a link in its place."""

    def vary(folder):
        (folder / name).rename(folder.parent / "disk")
        (folder / name).symlink_to(folder.parent / "disk")

    return vary


def moved_with_links_to_a_cache(folder):
    linked_to_a_cache(os.symlink)(folder)
    moved("build")(folder)


def modes(files, folders):
    def vary(folder):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.chmod(folders if path.is_dir() else files)
        folder.chmod(folders)

    return vary


def removed(*names):
    def vary(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return vary


def crlf(folder):
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        path = folder / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def byte_order_mark(folder):
    for name in ("params.yaml", "dvc.yaml"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def other_times(folder):
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))


def left_overs(folder):
    """What DVC, editors, file managers and killed stages leave beside outputs."""
    for name in (".gitignore", ".captions.parquet.0.aside", "report.html", "notes (copy).txt", ".DS_Store"):
        (folder / "build" / name).write_text("/x\n")
    (folder / "work" / "notes.txt").write_text("x")


VARIANTS = {
    "as it was built": lambda folder: None,
    "links to the cache": linked_to_a_cache(os.symlink),
    "relative links to the cache": linked_to_a_cache(os.symlink, relative=True),
    "links to a cache in the repository": linked_to_a_cache(os.symlink, cache="recipe/.dvc/cache"),
    "hard links to the cache": linked_to_a_cache(os.link),
    "a cache behind a link": cache_behind_a_link,
    "files that nobody may write": modes(0o444, 0o555),
    "umask 077": modes(0o600, 0o700),
    "umask 002": modes(0o664, 0o775),
    "a clone with pulled outs": removed("build/records", "work", "build/inputs.verified.json"),
    "no saved states": removed("work"),
    "CRLF": crlf,
    "a byte order mark": byte_order_mark,
    "other times of files": other_times,
    "left-overs": left_overs,
}  # fmt: skip
OWN = {
    "build on another disk": moved("build"),
    "states on another disk": moved("work"),
    "build on another disk, links to the cache": moved_with_links_to_a_cache,
}


def passes(code, found):
    assert code == 0 and not failed(found), failed(found)


def slow(names, quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "what", slow(VARIANTS, ("links to the cache", "hard links to the cache", "a clone with pulled outs", "CRLF"))
)
def test_an_honest_rebuild_passes(copy, what):
    VARIANTS[what](copy)
    passes(*audit(copy, "--data"))


@pytest.mark.ci
@pytest.mark.parametrize("what", slow(OWN, ("build on another disk, links to the cache", "states on another disk")))
def test_build_and_states_may_be_links_in_ones_own_repository_alone(copy, monkeypatch, what):
    OWN[what](copy)
    code, output = ask("audit", copy)
    assert code == 2 and "with the kohaku-delta of that repository" in output, output
    monkeypatch.setattr(artifact, "_is_own", lambda folder: True)
    passes(*audit(copy, "--data"))


def test_in_ones_own_repository_other_links_are_refused_as_well(copy, monkeypatch):
    monkeypatch.setattr(artifact, "_is_own", lambda folder: True)
    moved("build")(copy)
    for target, link in (("secret", "build/preview.png"), ("secrets", "build/samples"), ("secrets", "mirror/../x")):
        (copy.parent / "secrets").mkdir(exist_ok=True)
        (copy.parent / "secret").write_text("secret")
        path = copy / link
        if link.startswith("build"):
            path.rename(copy.parent / "kept")
            path.symlink_to(copy.parent / target)
            code, output = ask("audit", copy)
            assert code == 2 and "leads out of the recipe's folder" in output, output
            path.unlink()
            (copy.parent / "kept").rename(path)


def test_what_is_ones_own_lies_in_the_repository_of_the_code_and_is_no_bundle(tmp_path):
    assert artifact._is_own(ROOT / "miniature") and artifact._is_own(ROOT)
    assert not artifact._is_own(tmp_path)
    (ROOT / "work").mkdir(exist_ok=True)
    bundle = ROOT / "work" / "test-bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "bundle.json").write_text("{}")
    assert not artifact._is_own(bundle)
    shutil.rmtree(bundle)


def test_a_bundle_holds_no_links_wherever_it_lies(copy, monkeypatch, tmp_path):
    bundle = tmp_path / "bundle"
    assert ask("bundle", bundle, "--recipe", copy)[0] == 0
    moved("build")(bundle)
    monkeypatch.setattr(artifact, "REPOSITORY", tmp_path.resolve())
    code, output = ask("audit", bundle)
    assert code == 2 and "build" in output, output


@pytest.mark.ci
def test_a_path_may_have_any_characters(tmp_path):
    passes(*audit(rebuild_factory.write(tmp_path / "ünï 漢字" / "(1)/a'b\"c;$HOME & №1"), "--data"))


@pytest.mark.slow
def test_a_folder_may_be_named_from_within_through_its_build_or_through_a_link(copy, monkeypatch, tmp_path):
    passes(*audit(copy / "build"))
    (tmp_path / "link").symlink_to(copy)
    passes(*audit(tmp_path / "link"))
    monkeypatch.chdir(copy)
    passes(*audit("."))
    monkeypatch.chdir(copy / "build")
    passes(*audit(".."))


def test_a_bundle_of_linked_outputs_equals_that_of_copies(copy, honest_rebuild, tmp_path):
    assert ask("bundle", tmp_path / "copies.tar", "--recipe", copy)[0] == 0
    linked_to_a_cache(os.symlink)(copy)
    assert ask("bundle", tmp_path / "links.tar", "--recipe", copy)[0] == 0
    assert (tmp_path / "copies.tar").read_bytes() == (tmp_path / "links.tar").read_bytes()
    passes(*audit(tmp_path / "links.tar"))
    code, output = ask("compare", honest_rebuild, copy)
    assert code == 0 and output.startswith("equal: all "), output


def audit_elsewhere(folder, environment=None, become=""):
    """The audit in a process of its own."""
    code = f"import os, sys; {become}sys.path.insert(0, {str(ROOT / 'src')!r}); {AUDIT}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, env=os.environ | (environment or {}), cwd="/"
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    findings = json.loads(done.stdout)["findings"]
    assert not [each for each in findings if each["status"] == "FAIL"], findings
    return findings


@pytest.mark.slow
def test_an_audit_in_the_plainest_environment(copy):
    """No locale, no home directory that exists, another time zone and umask."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Tokyo", "HOME": "/nonexistent"}
    audit_elsewhere(copy, plain, "os.umask(0o777); ")


@pytest.mark.ci
@pytest.mark.skipif(
    os.getuid() != 0 or not all(folder.stat().st_mode & 0o001 for folder in Path(os.__file__).parents),
    reason="only root may become another user, and only with a Python that others may run",
)
@pytest.mark.parametrize("mode", slow(["readable", "read-only"], ("read-only",)))
def test_an_audit_by_another_user(copy, mode):
    """Files that are readable and not owned; in folders where nothing can be written."""
    modes(0o444, 0o555)(copy) if mode == "read-only" else modes(0o644, 0o755)(copy)
    for folder in copy.parents:
        if (
            folder.stat().st_uid == os.getuid()
            and folder not in Path("/tmp").resolve().parents
            and folder != Path("/tmp")
        ):
            folder.chmod(folder.stat().st_mode | 0o055)
    audit_elsewhere(copy, {"HOME": "/nonexistent"}, f"os.setgid({OTHER_USER}); os.setuid({OTHER_USER}); ")


def test_a_checkout_with_another_line_end_has_the_same_bytes(tmp_path):
    """core.autocrlf=true, as on Windows: .gitattributes says that no byte is converted."""
    subprocess.run(
        ["git", "-c", "core.autocrlf=true", "clone", "--quiet", "--shared", str(ROOT), str(tmp_path / "clone")],
        check=True,
    )
    names = subprocess.run(["git", "-C", str(ROOT), "ls-tree", "-r", "--name-only", "-z", "HEAD"], capture_output=True)
    texts = [name for name in names.stdout.decode().split("\0") if name.endswith((".yaml", ".lock", ".txt", ".py"))]
    assert "miniature/dvc.lock" in texts
    assert not [name for name in texts if b"\r\n" in (tmp_path / "clone" / name).read_bytes()]


def dvc(folder, *command):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *command, "-q"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symlink", "hardlink", "reflink,symlink", "copy", "pull"])
def test_what_dvc_itself_restored_passes(copy, kind):
    """`dvc checkout` from the cache with each type of link; `dvc pull` from a remote, without records."""
    dvc(copy.parent, "init", "--no-scm")
    store = copy.parent / ("remote" if kind == "pull" else ".dvc/cache")
    for path in [copy / out for name in rebuild_factory.STAGES for out in rebuild_factory.declared(copy, name)["outs"]]:
        for file in [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]:
            cached(file, store)
        if path.is_dir():
            found = rebuild_factory.hashed(path)
            listing = [
                {"md5": rebuild_factory.hashed(path / name)["md5"], "relpath": name} for name in sorted(found["files"])
            ]
            place = store / "files" / "md5" / found["md5"][:2] / found["md5"][2:]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(listing))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "pull":
        removed("build/records", "work")(copy)
        dvc(copy.parent, "remote", "add", "elsewhere", str(store))
        dvc(copy, "pull", "-r", "elsewhere")
    else:
        dvc(copy.parent, "config", "cache.type", kind)
        dvc(copy, "checkout")
    assert (copy / "build" / "samples" / "base-00.png").is_symlink() == ("symlink" in kind)
    passes(*audit(copy, "--data"))
