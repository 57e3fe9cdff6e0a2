"""The benchmarks' generated collections have danbooru2023's layout and test captions fairly."""

import sqlite3
import tarfile

import numpy as np
import pytest
from PIL import Image

import synthetic_danbooru
from danbooru_factory import caption
from kohaku_delta import params
from kohaku_delta.danbooru import tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, filtering


@pytest.mark.ci
@pytest.mark.parametrize("later", [False, True])
def test_captions_of_a_generated_collection_are_the_tools(tmp_path, later):
    parameters = params.load("params.yaml")
    pairs = synthetic_danbooru.write(tmp_path, 1500, 3, later)
    database = Database(tmp_path / "danbooru2023.db")
    assert len(np.concatenate(list(database.relations(np.copy)))) == pairs > 20 * 1500
    posts, dropped = filtering.filter_posts(
        database, tars.tars_in(tmp_path / "images"), database.post_ids(), parameters.filter, parameters.caption
    )
    assert posts.num_rows + dropped.num_rows == 1500 and dropped.num_rows > 0
    written = captions.caption_posts(database, posts["post_id"].to_numpy(), parameters.caption)
    with sqlite3.connect(tmp_path / "danbooru2023.db") as connection:
        expected = [caption(connection, post, parameters.caption)[2] for post in written["post_id"].to_pylist()]
    connection.close()
    assert written["caption"].to_pylist() == expected


def test_a_generated_collection_is_the_same_twice_and_its_images_can_be_decoded(tmp_path):
    for name in ("a", "b"):
        synthetic_danbooru.write(tmp_path / name, 800, 5, False)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} for name in ("a", "b")
    ]
    assert files[0] == files[1]
    for path in sorted((tmp_path / "a" / "images").iterdir()):
        with tarfile.open(path) as archive:
            for member in archive.getmembers()[:5]:
                with Image.open(archive.extractfile(member)) as image:
                    assert image.format == "WEBP" and image.convert("RGB").size == image.size
