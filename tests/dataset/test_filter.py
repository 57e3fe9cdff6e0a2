import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from danbooru_factory import picture, write_database, write_tar
from kohaku_delta import params
from kohaku_delta.danbooru import tar_index, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import filtering
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.training import buckets
from kohaku_delta.training.batch_builder import BatchBuilder


@pytest.fixture(scope="module")
def recipe():
    return params.load("params.yaml")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "tars"
    place.mkdir()
    return place


def run(path, folder, ids, recipe, **changes):
    posts, dropped = filtering.filter_posts(
        Database(path), tars.tars_in(folder), ids, recipe.filter.model_copy(update=changes), recipe.caption
    )
    assert sorted(posts["post_id"].to_pylist() + dropped["post_id"].to_pylist()) == sorted(set(ids))
    return posts, dict(zip(dropped["post_id"].to_pylist(), dropped["reason"].to_pylist(), strict=True))


def test_each_reason_is_given_to_its_posts_and_the_counts_add_up(tmp_path, folder, recipe):
    bomb = picture(17000, 16000, "PNG", "1")
    members = {
        1: ("webp", picture(24, 16)), 2: ("webp", b""), 3: ("webp", picture(300, 300)[:50]), 4: ("png", bomb),
        5: ("gif", picture(kind="GIF")),
        6: ("webp", picture()), 7: ("jpg", picture(33, 44, "JPEG")), 8: ("webp", b"no image" * 20), 9: ("mp4",
        b"film"), 20: ("webp", picture()),
        21: ("webp", picture()), 22: ("webp", picture()), 23: ("webp", picture()),
    }  # fmt: skip
    write_tar(
        folder / "data-0000.tar", [(f"{post * 1000}.{extension}", data) for post, (extension, data) in members.items()]
    )
    posts = [{"id": post * 1000} for post in (1, 2, 3, 4, 5, 7, 8, 9, 10)] + [{"id": 6000, "rating": None}]
    posts += [
        {"id": 11000, "is_deleted": 1, "is_banned": 1}, {"id": 12000, "is_banned": 1, "md5": None}, {"id": 13000,
        "md5": None}, {"id": 14000, "file_url": None},
        {"id": 15000, "file_ext": "mp4"}, {"id": 16000, "file_ext": "GIF"}, {"id": 20000, "is_deleted": 1},
        {"id": 21000, "is_banned": 1},
        {"id": 22000, "md5": None}, {"id": 23000, "file_ext": "gif"},
    ]  # fmt: skip
    path = write_database(tmp_path / "a.db", posts)
    trained, dropped = run(path, folder, [post["id"] for post in posts], recipe)
    assert dropped == {
        2000: "unreadable image", 3000: "unreadable image", 4000: "unreadable image", 5000: "not an image",
        6000: "caption impossible",
        8000: "unreadable image", 9000: "not an image", 10000: "missing from the tars", 11000: "deleted",
        12000: "banned", 13000: "hidden",
        14000: "hidden", 15000: "not an image", 16000: "not an image",
    }  # fmt: skip
    assert trained.select(["post_id", "tar", "width", "height", "despite"]).to_pylist() == [
        {"post_id": post, "tar": "data-0000.tar", "width": width, "height": height, "despite": despite}
        for post, width, height, despite in [
            (1000, 24, 16, None), (7000, 33, 44, None), (20000, 24, 16, "deleted"), (21000, 24, 16, "banned"), (22000,
            24, 16, "hidden"), (23000, 24, 16, "not an image")]
    ]  # fmt: skip
    for row in trained.to_pylist():
        assert tars.read_member(folder, row["tar"], row["offset"], row["size"]) == members[row["post_id"] // 1000][1]


def test_main_wins_over_recent_and_recent_over_the_add_on(tmp_path, folder, recipe):
    write_tar(folder / "data-0001.tar", [("1.webp", picture(10, 10)), ("2002.webp", picture(9, 9))])
    write_tar(folder / "data-1001.tar", [("1.webp", picture(11, 11)), ("1001.webp", picture(11, 12))])
    write_tar(
        folder / "data-2000.tar",
        [
            ("1.webp", picture(12, 12)),
            ("1001.webp", picture(12, 13)),
            ("2001.webp", picture(12, 14)),
            ("2002.webp", picture(12, 15)),
        ],
    )
    write_tar(folder / "data-0002.tar", [])
    path = write_database(tmp_path / "a.db", [{"id": post} for post in (1, 1001, 2001, 2002, 3001)])
    trained, dropped = run(path, folder, [1, 1001, 2001, 2002, 3001], recipe)
    found = {row["post_id"]: (row["tar"], row["height"]) for row in trained.to_pylist()}
    assert found == {
        1: ("data-0001.tar", 10),
        1001: ("data-1001.tar", 12),
        2001: ("data-2000.tar", 14),
        2002: ("data-2000.tar", 15),
    }
    assert dropped == {3001: "missing from the tars"}


def test_header_and_decode_agree_on_sound_images_and_decode_sees_more(tmp_path, folder, recipe):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    damaged = bytearray(file.getvalue())
    damaged[500:600] = bytes(100)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    film = {"save_all": True, "append_images": [Image.new("RGB", (14, 15), "red")]}
    files = [
        ("1.webp", picture(30, 20)), ("1001.png", picture(20, 30, "PNG", "P")), ("2001.jpg", picture(9, 8, "JPEG",
        "CMYK")), ("3001.png", bytes(damaged)),
        ("4001.webp", picture(14, 15, **film)), ("5001.png", picture(7, 6, "PNG", "P", transparency=77)), ("6001.jpg",
        picture(40, 30, "JPEG", exif=rotated)),
        ("7001.webp", picture(11, 12, mode="RGBA", lossless=True)), ("8001.bmp", picture(5, 6, "BMP")), ("9001.jpeg",
        picture(8, 9, "JPEG", "L")),
        ("10001.webp", b""), ("11001.png", b""), ("12001.jpg", picture(900, 900, "JPEG")[:200]), ("13001.webp",
        picture(900, 900, "PNG")),
    ]  # fmt: skip
    write_tar(folder / "data-0001.tar", files)
    ids = [int(name.split(".")[0]) for name, _ in files]
    path = write_database(tmp_path / "a.db", [{"id": post} for post in ids])
    header, lost = run(path, folder, ids, recipe, image_check="header")
    decoded, dropped = run(path, folder, ids, recipe, image_check="decode")
    assert dropped == lost | {3001: "unreadable image"}
    assert lost == dict.fromkeys((10001, 11001, 12001), "unreadable image")
    assert decoded.equals(header.filter(pc.not_equal(header["post_id"], 3001)))
    sizes = dict(
        zip(
            decoded["post_id"].to_pylist(),
            zip(decoded["width"].to_pylist(), decoded["height"].to_pylist(), strict=True),
            strict=True,
        )
    )
    assert sizes == {
        1: (30, 20), 1001: (20, 30), 2001: (9, 8), 4001: (14, 15), 5001: (7, 6), 6001: (40, 30), 7001: (11, 12),
        8001: (5, 6), 9001: (8, 9), 13001: (900, 900),
    }  # fmt: skip


def test_an_image_that_would_need_the_memory_of_thousands_is_dropped_with_its_own_reason(tmp_path, folder, recipe):
    sizes = {1: (1, 16383), 2: (16383, 1), 3: (1, 256), 4: (257, 1), 5: (2, 512), 6: (1, 1), 7: (16383, 63)}
    write_tar(folder / "data-0000.tar", [(f"{post * 1000}.webp", picture(*size)) for post, size in sizes.items()])
    ids = [post * 1000 for post in sizes]
    path = write_database(tmp_path / "a.db", [{"id": post} for post in ids])
    for check in ("header", "decode"):
        trained, dropped = run(path, folder, ids, recipe, image_check=check)
        assert dropped == dict.fromkeys((1000, 2000, 4000, 7000), "extreme aspect ratio")
        assert trained["post_id"].to_pylist() == [3000, 5000, 6000]
    assert not run(path, folder, ids, recipe, max_aspect_ratio=16383)[1]


def test_no_image_that_is_kept_grows_beyond_seventeen_million_pixels_in_its_bucket(recipe):
    sides = np.unique([*np.geomspace(1, 16383, 400).astype(int), 256])
    width, height = (each.ravel() for each in np.meshgrid(sides, sides))
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    kept = longer <= recipe.filter.max_aspect_ratio * shorter
    width, height, sizes = width[kept], height[kept], buckets.all_buckets(recipe.schedule)
    chosen = buckets.choose_bucket(width, height, sizes).tolist()
    resized = [
        math.prod(buckets.resized(size, sizes[bucket]))
        for size, bucket in zip(zip(width.tolist(), height.tolist(), strict=True), chosen, strict=True)
    ]
    assert max(resized) == recipe.filter.max_aspect_ratio * recipe.schedule.min_side**2 == 1 << 24


def test_missing_main_tars_are_named(tmp_path, folder, recipe):
    write_tar(folder / "data-0001.tar", [])
    path = write_database(tmp_path / "a.db", [{"id": post} for post in (1, 7, 1012)])
    with pytest.raises(UserError, match="2 main tars .* data-0007.tar, data-0012.tar.*Download"):
        run(path, folder, [1, 7, 1012], recipe)


def test_a_damaged_tar_stops_the_run_with_its_name(tmp_path, folder, recipe):
    (folder / "data-0001.tar").write_bytes(b"")
    path = write_database(tmp_path / "a.db", [{"id": 1}])
    with pytest.raises(UserError, match="data-0001.tar is empty"):
        run(path, folder, [1], recipe)


def test_a_refused_database_stops_the_indexing_of_the_tars(tmp_path, folder, recipe, monkeypatch):
    told = []
    write_tar(folder / "data-0001.tar", [])
    monkeypatch.setattr(tar_index, "index_tars", lambda files, keep, stop: told.append(stop.wait(60)))
    write_database(tmp_path / "a.db", [{"id": 1}])
    with pytest.raises(UserError, match="has no post 2"):
        filtering.filter_posts(
            Database(tmp_path / "a.db"), tars.tars_in(folder), [1, 2], recipe.filter, recipe.caption, None, ()
        )
    assert told == [True]


def test_posts_of_another_database_are_refused(tmp_path, folder, recipe):
    write_tar(folder / "data-0001.tar", [])
    path = write_database(tmp_path / "a.db", [{"id": 1}])
    with pytest.raises(UserError, match="has no post 1001"):
        run(path, folder, [1, 1001], recipe)


def test_a_rotated_picture_on_a_background_is_kept_with_its_turned_size_and_trained_as_filter_saw_it(
    tmp_path, folder, recipe
):
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = io.BytesIO()
    Image.new("RGBA", (24, 16), (9, 9, 9, 0)).save(clear, "PNG", exif=exif)
    write_tar(folder / "data-0001.tar", [("1.png", clear.getvalue()), ("1001.jpg", picture(40, 30, "JPEG"))])
    path = write_database(tmp_path / "a.db", [{"id": 1}, {"id": 1001}])
    sizes = {}
    for changes in ({}, {"alpha_background": [255, 255, 255], "exif_rotation": True}):
        parameters = recipe.filter.model_copy(update=changes)
        files = tars.tars_in(folder)
        posts, _ = filtering.filter_posts(
            Database(path), files, [1, 1001], parameters, recipe.caption, None, expected=()
        )
        sizes[bool(changes)] = list(zip(posts["width"].to_pylist(), posts["height"].to_pylist(), strict=True))
        stored = tmp_path / "posts.parquet"
        parquet.write(posts, stored, filtering.decoding(parameters).metadata)
        read = parquet.read(stored, ["post_id", "tar", "offset", "size", "width", "height"])
        captions = pa.table({"post_id": [1, 1001], "caption": ["", ""]})
        builder = BatchBuilder(read, captions, folder, (None, None), recipe.train, "|||", 8)
        assert (builder.pixels(1, (64, 64))[0] == (255 if changes else 9)).all()
    assert sizes == {False: [(24, 16), (40, 30)], True: [(16, 24), (40, 30)]}


def test_rotation_without_decoding_is_refused_in_the_recipe(tmp_path):
    text = Path("params.yaml").read_text().replace("exif_rotation: false", "exif_rotation: true")
    (tmp_path / "params.yaml").write_text(text.replace("image_check: decode", "image_check: header"))
    with pytest.raises(UserError, match="exif_rotation: true exchanges width and height .* set filter.image_check"):
        params.load(tmp_path / "params.yaml")


def test_a_picture_that_is_reencoded_is_kept_with_its_smaller_size_and_trained_as_filter_saw_it(
    tmp_path, folder, recipe
):
    write_tar(folder / "data-0001.tar", [("1.png", picture(3000, 2000, "PNG"))])
    path = write_database(tmp_path / "a.db", [{"id": 1}])
    parameters = recipe.filter.model_copy(update={"reencode_webp": True})
    posts, _ = filtering.filter_posts(Database(path), tars.tars_in(folder), [1], parameters, recipe.caption, None, ())
    assert (posts["width"].to_pylist(), posts["height"].to_pylist()) == ([2508], [1672])
    builder = BatchBuilder(
        posts, pa.table({"post_id": [1], "caption": [""]}), folder, (None, None), recipe.train, "|||", 8
    )
    pixels, size = builder.pixels(1, (64, 64))
    assert size == (2508, 1672) and pixels.shape == (64, 64, 3)


@pytest.mark.parametrize(
    "old, new", [("image_check: decode", "image_check: header"), ("max_pixels: 26", "max_pixels: 56")]
)
def test_reencoding_that_filter_cannot_check_is_refused_in_the_recipe(tmp_path, old, new):
    text = Path("params.yaml").read_text().replace("reencode_webp: false", "reencode_webp: true")
    (tmp_path / "params.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match="reencode_webp: true .* needs image_check: decode and max_pixels of at most"):
        params.load(tmp_path / "params.yaml")
