"""A picture that fails in training although filter accepted it: what a person reads, and that nothing is lost."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

import tiny_training
from danbooru_factory import picture, write_tar
from kohaku_delta.danbooru import image, tars
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.training.batch_builder import BatchBuilder

ROOT = Path(__file__).resolve().parents[2]
SIZE = len(picture(24, 16))
WHERE = rf"Post 1000 \(data-0000.tar, {SIZE} bytes from byte 512\)"


@pytest.fixture
def builder(tmp_path):
    write_tar(tmp_path / "data-0000.tar", [("1000.webp", picture(24, 16))])
    place = {"post_id": 1000, "tar": "data-0000.tar", "offset": 512, "size": SIZE, "width": 24, "height": 16}
    captions = pa.table({"post_id": [1000], "caption": ["x"]})
    recipe = load(ROOT / "miniature" / "params.yaml")
    return BatchBuilder(pa.Table.from_pylist([place]), captions, tmp_path, None, recipe.train, "|||", 8)


def write_over(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def message(builder) -> str:
    with pytest.raises(UserError, match=WHERE) as raised:
        builder.pixels(1000, (64, 64))
    text = raised.value.message
    assert "Change nothing in params.yaml" in text and "last saved state" in text and "inputs.verified.json" in text
    return text


def test_a_sound_image_fills_its_bucket(builder):
    pixels, size = builder.pixels(1000, (64, 64))
    assert pixels.shape == (64, 64, 3) and size == (24, 16)


def test_an_image_is_decoded_if_filter_accepted_it_whatever_limit_the_recipe_gave(builder, monkeypatch):
    monkeypatch.setattr(image.decode, "__defaults__", (24 * 16 - 1, image.RELEASE))
    assert builder.pixels(1000, (64, 64))[1] == (24, 16)


def test_bytes_that_can_no_longer_be_decoded_are_named_with_what_to_do(builder):
    write_over(builder.folder / "data-0000.tar", 512, bytes(SIZE))
    text = message(builder)
    assert "no longer has the bytes that the filter stage checked" in text
    assert "begins another training" in text and "stages/bake.py --lokr" in text  # of a recipe that checks headers only


def test_an_image_of_another_size_is_no_reason_to_run_filter_again(builder):
    other = picture(16, 24)
    write_over(builder.folder / "data-0000.tar", 512, other + bytes(max(0, SIZE - len(other))))
    assert "is 16×24; posts.parquet says 24×16" in message(builder)


def test_a_tar_that_was_cut_off_or_is_gone_or_whose_disk_fails_is_named(builder, monkeypatch):
    path = builder.folder / "data-0000.tar"
    os.truncate(path, 512 + SIZE // 2)
    assert f"{path} ends at byte {512 + SIZE // 2}" in message(builder)
    path.rename(path.with_suffix(".away"))
    assert f"{path} cannot be read from byte 512 to {512 + SIZE}: No such file" in message(builder)
    path.with_suffix(".away").rename(path)

    def fails(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tars.os, "pread", fails)
    assert f"{path} cannot be read from byte 512 to {512 + SIZE}: Input/output error" in message(builder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_goes_on_to_the_same_bytes_when_the_damaged_tar_is_put_back(tmp_path, workers):
    folder = tiny_training.write(tmp_path / "training", 16, workers=workers)
    shutil.copytree(ROOT / "data" / "images", tmp_path / "images")

    def train() -> subprocess.CompletedProcess:
        command = [*tiny_training.command(1), "--tars", tmp_path / "images"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    whole = train()
    assert whole.returncode == 0, whole.stderr
    outs = tiny_training.outs(folder)
    shutil.rmtree(folder / "work")

    schedule = tiny_training.parquet.read(folder / "build" / "schedule.parquet").to_pylist()
    last = max(schedule, key=lambda row: row["step"])["posts"][0]
    posts = {row["post_id"]: row for row in tiny_training.parquet.read(folder / "build" / "posts.parquet").to_pylist()}
    place = posts[last]
    tar = tmp_path / "images" / place["tar"]
    data = tars.read_member(tar.parent, tar.name, place["offset"], place["size"])
    write_over(tar, place["offset"], bytes(place["size"]))
    failed = train()
    assert failed.returncode == 1 and f"Post {last} ({tar.name}" in failed.stderr
    assert "no longer has the bytes" in failed.stderr and "Traceback" not in failed.stderr
    write_over(tar, place["offset"], data)
    again = train()
    assert again.returncode == 0, again.stderr
    assert tiny_training.outs(folder) == outs
