"""`release/` holds the outputs of a finished build under the published names, if they are those of its lock."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import build_factory
import rebuild_factory
from kohaku_delta.cli.main import main
from kohaku_delta.publishing import release_folder

NAMES = {
    "kohaku-xl-delta-rev1.safetensors": "kohaku-xl-delta.safetensors",
    "kohaku-xl-delta-base.safetensors": "delta-base.safetensors",
    "lyco-ckpts/kohaku-xl-delta-lyco.safetensors": "delta-lokr.safetensors",
    "lyco-ckpts/kohaku-xl-delta-lyco-step00000004.safetensors": "milestones/delta-lokr-step00000004.safetensors",
    "docs/artists-kxl-delta.json": "artists-kxl-delta.json",
    "docs/characters-kxl-delta.json": "characters-kxl-delta.json",
    "docs/bucket.txt": "bucket.txt",
    "unet/diffusion_pytorch_model.safetensors": "diffusers/unet/diffusion_pytorch_model.safetensors",
    "model_index.json": "diffusers/model_index.json",
    "samples/final-00.png": "samples/final-00.png",
    "preview.png": "preview.png",
}
WRITTEN = {"README.md", "docs/training.toml", "docs/preset.toml", "bom.json", "croissant.json"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A build with content that the card can read."""
    folder = rebuild_factory.write(tmp_path_factory.mktemp("finished") / "recipe")
    losses = {name: {"loss": {"sdxl": loss, "training": loss}} for name, loss in (("base", 0.5), ("final", 0.25))}
    steps = "".join(f"{step},0.5,0.1,0.01,0.01\n" for step in range(15))
    for name, text in {
        "dataset.json": json.dumps(build_factory.DATASET),
        "held-out.json": json.dumps({"posts": 3, **losses}),
        "curves.csv": "step,loss,gradient_norm,learning_rate_unet,learning_rate_text\n" + steps,
        "milestones.csv": "step,held_out_loss,held_out_loss_training\n0,0.5,0.5\n4,0.25,0.25\n",
        "artists-kxl-delta.json": "{}",
        "characters-kxl-delta.json": "[]",
    }.items():
        (folder / "build" / name).write_text(text)
    rebuild_factory.lock(folder)
    return folder


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    """A copy at the same depth, whose root is the repository."""
    folder = tmp_path / "recipe"
    shutil.copytree(finished, folder)
    values = rebuild_factory.loaded(folder / "params.yaml")
    rebuild_factory.dump(folder / "params.yaml", values | {"root": os.path.relpath(rebuild_factory.ROOT, folder)})
    rebuild_factory.lock(folder)
    return folder


def make(folder: Path):
    return CliRunner().invoke(main, ["release", str(folder)])


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_has_the_published_names_and_the_bytes_of_the_outputs(recipe):
    done = make(recipe)
    assert done.exit_code == 0, done.output
    files = tree(recipe / "release")
    assert {*NAMES, *WRITTEN} <= files.keys()
    for name, out in NAMES.items():
        assert files[name] == (recipe / "build" / out).read_bytes(), name
    for folder in ("milestones", "diffusers", "samples"):
        assert {data for name, data in tree(recipe / "build" / folder).items()} <= {*files.values()}
    assert all(f"  {name}\n" in done.output for name in files)


def test_weights_are_not_stored_twice(recipe):
    make(recipe)
    for name, out in NAMES.items():
        assert (recipe / "release" / name).samefile(recipe / "build" / out)


def test_the_card_names_the_files_as_they_are_in_the_folder(recipe):
    make(recipe)
    card = (recipe / "release" / "README.md").read_text()
    for name in ("kohaku-xl-delta-rev1.safetensors", "lyco-ckpts/kohaku-xl-delta-lyco.safetensors"):
        assert f"| `{name}` |" in card
    assert 'from_pretrained(".",' in card and "delta-lokr.safetensors" not in card


def test_samples_keep_their_parameters(recipe):
    make(recipe)
    with Image.open(recipe / "release" / "samples" / "final-00.png") as picture:
        assert "Steps: 24" in picture.text["parameters"]


def test_the_same_build_gives_the_same_folder_and_no_output_moves(recipe):
    before = tree(recipe / "build")
    make(recipe)
    first = tree(recipe / "release")
    assert make(recipe).exit_code == 0
    assert tree(recipe / "release") == first and tree(recipe / "build") == before
    assert not list(recipe.glob(".*"))


def test_other_names_come_from_params_yaml(recipe):
    values = rebuild_factory.loaded(recipe / "params.yaml")
    values["release"] |= {"lokr": "lokr/mine.safetensors", "final": "mine.safetensors"}
    rebuild_factory.dump(recipe / "params.yaml", values)
    assert make(recipe).exit_code == 0
    files = tree(recipe / "release")
    assert {"lokr/mine.safetensors", "lokr/mine-step00000004.safetensors", "mine.safetensors"} <= files.keys()
    assert b'output_name = "mine"' in files["docs/training.toml"]


@pytest.mark.parametrize(
    "names", [{"final": "docs/bucket.txt"}, {"final": "README.md"}, {"final": "unet"}, {"preset": "samples"}]
)
def test_two_files_of_one_name_are_refused(recipe, names):
    values = rebuild_factory.loaded(recipe / "params.yaml")
    values["release"] |= names
    rebuild_factory.dump(recipe / "params.yaml", values)
    done = make(recipe)
    assert done.exit_code == 1 and "release of params.yaml" in done.output and not (recipe / "release").exists()


@pytest.mark.parametrize(
    "name", ["../final.safetensors", "/final.safetensors", "a//b", ".hidden", "docs/../../x", "a b", "a\\b"]
)
def test_a_name_outside_the_folder_is_refused(recipe, name):
    values = rebuild_factory.loaded(recipe / "params.yaml")
    values["release"]["final"] = name
    rebuild_factory.dump(recipe / "params.yaml", values)
    done = make(recipe)
    assert done.exit_code == 1 and "release.final" in done.output


@pytest.mark.parametrize(
    "out", ["kohaku-xl-delta.safetensors", "samples/final-00.png", "curves.csv", "selection.parquet"]
)
def test_a_build_with_a_changed_output_is_refused(recipe, out):
    make(recipe)
    kept = tree(recipe / "release")
    path = recipe / "build" / out
    data = path.read_bytes()
    path.unlink()  # as every writer here does: the release's file is a link
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = make(recipe)
    assert done.exit_code == 1 and "lock/outs" in done.output and f"build/{out.split('/')[0]}" in done.output
    assert tree(recipe / "release") == kept


def test_a_build_that_misses_an_output_a_stage_or_a_parameter_is_refused(recipe):
    (recipe / "build" / "preview.png").rename(recipe / "preview.png")
    assert "build/preview.png (of preview) does not exist" in make(recipe).output
    (recipe / "preview.png").rename(recipe / "build" / "preview.png")
    values, lock = rebuild_factory.loaded(recipe / "params.yaml"), rebuild_factory.loaded(recipe / "dvc.lock")
    rebuild_factory.dump(recipe / "params.yaml", values | {"bake": values["bake"] | {"title": "Another"}})
    assert "lock/parameters" in make(recipe).output
    rebuild_factory.dump(recipe / "params.yaml", values)
    del lock["stages"]["milestones"]
    rebuild_factory.dump(recipe / "dvc.lock", lock)
    assert "lock/pipeline" in make(recipe).output
    assert not (recipe / "release").exists()


def test_what_somebody_else_put_into_the_folder_is_not_deleted(recipe):
    make(recipe)
    (recipe / "release" / "mine.png").write_text("mine")
    done = make(recipe)
    assert done.exit_code == 1 and "mine.png" in done.output
    assert (recipe / "release" / "mine.png").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_files_are_copied_and_that_is_said_before(recipe, monkeypatch, code):
    said = []

    def refuse(source, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", lambda *paths, copy=shutil.copyfile: (said.append(paths), copy(*paths)))
    done = make(recipe)
    assert done.exit_code == 0 and "are copied, because no hard link" in done.output.splitlines()[0] and said
    assert not (recipe / "release" / "preview.png").samefile(recipe / "build" / "preview.png")
    assert (recipe / "release" / "preview.png").read_bytes() == (recipe / "build" / "preview.png").read_bytes()


def test_copies_that_do_not_fit_are_refused_before_the_first(recipe, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    done = make(recipe)
    assert done.exit_code == 1 and "only 1 bytes are free" in done.output
    assert not (recipe / "release").exists() and not list(recipe.glob(".*"))


def test_a_killed_command_leaves_no_folder_that_looks_finished(recipe, monkeypatch):
    """The process ends in the middle; the next run clears what is left."""
    pid = os.fork()
    if pid == 0:
        links = iter(range(3))
        release_folder.os.link = lambda source, target, link=os.link: (
            link(source, target) if next(links, None) is not None else os._exit(9)
        )
        make(recipe)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (recipe / "release").exists() and list(recipe.glob(".release.*.aside"))
    assert make(recipe).exit_code == 0
    assert (recipe / "release" / "README.md").exists() and not list(recipe.glob(".release.*"))


def test_a_bundle_has_no_release(recipe, tmp_path):
    assert CliRunner().invoke(main, ["bundle", str(tmp_path / "b"), "--recipe", str(recipe)]).exit_code == 0
    done = make(tmp_path / "b")
    assert done.exit_code == 1 and "is a bundle" in done.output
