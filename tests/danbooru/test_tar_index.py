"""The index of the tars: kept, believed only while it is true, and checked against the public one."""

import hashlib
import json
import os
from threading import Event

import pytest

from danbooru_factory import picture, write_database, write_tar
from kohaku_delta import params
from kohaku_delta.danbooru import tar_index, tar_reader, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import filtering
from kohaku_delta.errors import UserError


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for number, posts in ((1, (1, 1001, 2001)), (2, (2, 1002)), (1001, (3001,))):
        write_tar(place / f"data-{number:04d}.tar", [(f"{post}.webp", picture(post % 500 + 10, 20)) for post in posts])
    return place


@pytest.fixture
def walks(monkeypatch):
    """The names of the tars that are read."""
    names, walk = [], tar_reader.list_tar
    monkeypatch.setattr(tar_reader, "list_tar", lambda path: names.append(path.name) or walk(path))
    return names


def publish(tar, **changes):
    """The public index of a tar, as the site has it."""
    held = tar_index.members_of(tar)
    files = {}
    for post, offset, size in zip(held.id.tolist(), held.offset.tolist(), held.size.tolist(), strict=True):
        data = tars.read_member(tar.parent, tar.name, offset, size)
        files[f"{post}.webp"] = {"offset": offset, "size": size, "sha256": hashlib.sha256(data).hexdigest()}
    content = {
        "filesize": tar.stat().st_size,
        "hash": "0",
        "hash_lfs": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "files": files,
    }
    tar.with_suffix(".json").write_text(json.dumps(content | changes))


def look(folder, ids, expected=range(1000), keep=None):
    recipe = params.load("params.yaml")
    path = folder.parent / "a.db"
    if not path.is_file():
        write_database(path, [{"id": post} for post in ids])
    return filtering.filter_posts(
        Database(path), tars.tars_in(folder), ids, recipe.filter, recipe.caption, keep, expected
    )


def test_once_stopped_no_further_tar_is_read_and_what_was_read_is_kept(folder, walks):
    files = tars.tars_in(folder)
    stop = Event()
    stop.set()
    assert tar_index.index_tars(files, tar_index.default_index_path(files), stop) == {} and walks == []
    assert len(tar_index.index_tars(files, tar_index.default_index_path(files))) == len(walks) == 3


def test_tars_are_read_once_and_again_only_when_they_changed(folder, walks):
    files = tars.tars_in(folder)
    keep = tar_index.default_index_path(files)
    assert keep == folder.parent / "images.members.parquet"
    first = tar_index.index_tars(files, keep)
    assert sorted(walks) == ["data-0001.tar", "data-0002.tar", "data-1001.tar"]
    walks.clear()
    again = tar_index.index_tars(files, keep)
    assert walks == [] and again.keys() == first.keys()
    for number in first:
        assert all(
            (getattr(again[number], name) == getattr(first[number], name)).all()
            for name in ("id", "offset", "size", "width", "height", "sound")
        )
        assert again[number].extension.equals(first[number].extension)
    write_tar(folder / "data-0002.tar", [("2.webp", picture(50, 60))])
    assert tar_index.index_tars(files, keep)[2].width.tolist() == [50]
    assert walks == ["data-0002.tar"]
    os.utime(folder / "data-1001.tar", (1, 1))
    tar_index.index_tars(files, keep)
    assert walks == ["data-0002.tar", "data-1001.tar"]


def test_a_part_of_the_tars_does_not_forget_the_others(folder, walks):
    files = tars.tars_in(folder)
    tar_index.index_tars(files, tar_index.default_index_path(files))
    walks.clear()
    write_tar(folder / "data-0002.tar", [])
    tar_index.index_tars({2: files[2]}, tar_index.default_index_path(files))
    tar_index.index_tars({1: files[1], 1001: files[1001]}, tar_index.default_index_path(files))
    assert walks == ["data-0002.tar"]


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really PAR1", b"\0" * 5000])
def test_an_index_that_cannot_be_read_is_made_again(folder, walks, content):
    keep = tar_index.default_index_path(tars.tars_in(folder))
    keep.write_bytes(content)
    tar_index.index_tars(tars.tars_in(folder), keep)
    tar_index.index_tars(tars.tars_in(folder), keep)
    assert len(walks) == 3


def test_a_place_that_cannot_be_written_is_no_obstacle(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert len(tar_index.index_tars(tars.tars_in(folder), tmp_path / "file" / "index.parquet")) == 3
    assert "cannot be kept at" in capsys.readouterr().err


def test_what_was_read_before_a_damaged_tar_is_kept(folder, walks):
    files = tars.tars_in(folder)
    (folder / "data-1001.tar").write_bytes(b"x" * 600)
    for _ in range(2):
        with pytest.raises(UserError, match="data-1001.tar is not a tar"):
            tar_index.index_tars(files, tar_index.default_index_path(files))
    assert walks.count("data-0001.tar") == walks.count("data-0002.tar") == 1


def test_the_public_index_is_read_and_its_members_are_verified(folder, walks):
    expected = tar_index.members_of(folder / "data-0001.tar")
    publish(folder / "data-0001.tar")
    walks.clear()
    held = tar_index.members_of(folder / "data-0001.tar")
    assert walks == []
    for name in ("id", "offset", "size", "width", "height", "sound"):
        assert (getattr(held, name) == getattr(expected, name)).all()


def test_a_member_with_another_sha256_is_dropped_and_the_run_goes_on(folder):
    publish(folder / "data-0001.tar")
    held = tar_index.members_of(folder / "data-0001.tar")
    with open(folder / "data-0001.tar", "r+b") as file:
        file.seek(int(held.offset[1]) + 40)
        file.write(b"\xff")
    posts, dropped = look(folder, [1, 1001, 2001])
    assert posts["post_id"].to_pylist() == [1, 2001]
    assert dropped.to_pylist() == [{"post_id": 1001, "reason": "unreadable image"}]


def test_an_index_of_another_tar_is_refused_with_both_names(folder):
    publish(folder / "data-0001.tar", filesize=99)
    with pytest.raises(
        UserError, match="data-0001.tar has .* bytes, its index .*data-0001.json says 99.*download both again"
    ):
        tar_index.members_of(folder / "data-0001.tar")
    publish_files = {"1.webp": {"offset": 10**9, "size": 5, "sha256": "0"}}
    publish(folder / "data-0002.tar", files=publish_files)
    with pytest.raises(UserError, match="damaged"):
        tar_index.members_of(folder / "data-0002.tar")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"filesize": "x", "files": {}}',
        '{"filesize": 1, "files": [1]}',
        '{"filesize": 1, "files": {"1.webp": {"offset": 0}}}',
    ],
)
def test_a_public_index_that_cannot_be_read_is_named(folder, text):
    (folder / "data-0001.json").write_text(text)
    with pytest.raises(UserError, match="data-0001.json"):
        tar_index.members_of(folder / "data-0001.tar")


def test_partial_drops_posts_of_absent_tars_and_says_so(folder):
    with pytest.raises(UserError, match="1 main tars of selected posts do not exist: data-0005.tar.*--partial"):
        look(folder, [1, 5, 1002])
    posts, dropped = look(folder, [1, 5, 1002], expected=())
    assert posts["post_id"].to_pylist() == [1, 1002]
    assert dropped.to_pylist() == [{"post_id": 5, "reason": "missing from the tars"}]


def test_no_tar_at_all_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="There is no tar"):
        look(tmp_path / "images", [1], expected=())
