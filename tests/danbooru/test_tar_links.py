"""original/, recent/ and updates/<date>/ of nyanko7/danbooru2023 are used as one folder of tars."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_partial_download import index

import synthetic_danbooru
import synthetic_originals
from danbooru_factory import picture, write_database, write_tar
from fake_hub import REVISION, trust_fake_hub
from kohaku_delta import params
from kohaku_delta.danbooru import partial_download, posts_json, tar_links, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, fetch_inputs, filtering
from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import Download, Pin

ROOT = Path(__file__).resolve().parents[2]
TARS = {
    "original/data-0001.tar": [("1001.jpg", "JPEG"), ("2001.gif", "GIF"), ("3001.zip", None)],
    "original/data-0002.tar": [("1002.png", "PNG")],
    "recent/data-1001.tar": [("1001.png", "PNG"), ("4001.png", "PNG")],
    "updates/20240319/dataset-1.tar": [("4001.jpg", "JPEG"), ("5001.jpg", "JPEG"), ("6001.mp4", None)],
    "updates/20240522/dataset-1.tar": [("5001.png", "PNG"), ("7001.jpg", "JPEG"), ("3001.jpg", "JPEG")],
}
IDS = [1001, 1002, 2001, 3001, 4001, 5001, 6001, 7001]
KEPT = {
    1001: "data-0001.tar", 1002: "data-0002.tar", 4001: "data-1001.tar", 5001: "update-20240319-1.tar",
    7001: "update-20240522-1.tar",
}  # fmt: skip


@pytest.fixture
def originals(tmp_path):
    """Tars of that layout, and the posts as posts.json."""
    for name, members in TARS.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, [(each, picture(40, 30, kind) if kind else b"no picture") for each, kind in members])
    posts = [{"id": post, "file_ext": "mp4" if post == 6001 else "jpg"} for post in IDS]
    database = write_database(tmp_path / "a.db", posts, [(1, "solo", 0)], [(post, 1) for post in IDS])
    synthetic_originals.write_posts_json(database, tmp_path / "data" / "metadata" / "posts.json")
    return tmp_path


def recipe_for(inputs, images="all"):
    recipe = params.load("params.yaml")
    ranges = [recipe.selection.ranges[0].model_copy(update={"from_": 0})]
    changes = {
        "download": Download(mirror="mirror", images=images, inputs=inputs),
        "selection": recipe.selection.model_copy(update={"ranges": ranges}),
        "merge": recipe.merge.model_copy(update={"start": "published"}),
    }
    return recipe.model_copy(update=changes)


def pinned(urls):
    return [Pin(url=url, bytes=None, sha256=None) for url in urls]


def local_inputs():
    (posts,) = pinned(["file://data/metadata/posts.json"])
    return {"posts": posts, "tars": pinned(f"file://data/{name}" for name in reversed(TARS))}


def gathered(recipe, folder):
    """The entries of inputs.json, and the tars by number as the stages find them."""
    manifest = folder / "build" / "inputs.json"
    entries = fetch_inputs.fetch_inputs(recipe, folder)
    inputs_manifest.write(entries, folder, recipe.merge.start, manifest)
    return json.loads(manifest.read_text())["inputs"], tars.tars_by_number(inputs_manifest.paths(manifest, "tars"))


def filtered(recipe, folder, files):
    database = Database(inputs_manifest.path(folder / "build" / "inputs.json", "database"))
    return filtering.filter_posts(database, files, IDS, recipe.filter, recipe.caption, folder / "i.parquet", ())


def test_the_first_tar_that_holds_a_post_counts_and_members_of_every_kind_have_their_reason(originals):
    recipe = recipe_for(local_inputs())
    entries, files = gathered(recipe, originals)
    assert sorted(files) == [1, 2, 1001, 10_000, 10_001]
    posts, dropped = filtered(recipe, originals, files)
    assert dict(zip(posts["post_id"].to_pylist(), posts["tar"].to_pylist(), strict=True)) == KEPT
    assert dropped.to_pylist() == [{"post_id": post, "reason": "not an image"} for post in (2001, 3001, 6001)]
    for row in posts.to_pylist():
        data = tars.read_member(files[1].parent, row["tar"], row["offset"], row["size"])
        kind = "JPEG" if row["post_id"] in (1001, 5001, 7001) else "PNG"
        assert data == picture(40, 30, kind)
    assert {Path(entry["path"]).parts[2] for entry in entries["tars"]} == {"linked"}
    assert entries["database"]["pinned"] == "converted"
    assert entries["database"]["url"] == "file://data/metadata/posts.json#danbooru2023.db"
    folder = Path(entries["database"]["path"]).parent
    assert folder.name == entries["posts"]["sha256"] and folder.parts[1:3] == ("mirror", "converted")


def test_download_again_writes_the_same_list_and_a_damaged_database_is_named_and_made_again(originals):
    recipe = recipe_for(local_inputs())
    gathered(recipe, originals)
    manifest = originals / "build" / "inputs.json"
    before = manifest.read_bytes()
    database = inputs_manifest.path(manifest, "database")
    database.write_bytes(database.read_bytes().replace(b"solo", b"sole"))
    with pytest.raises(
        UserError, match="was edited or replaced.*Run the download stage again.*makes the database again"
    ):
        inputs_manifest.path(manifest, "database")
    gathered(recipe, originals)
    assert manifest.read_bytes() == before and inputs_manifest.path(manifest, "database") == database


def test_stages_in_their_sandbox_read_the_converted_database_and_the_linked_tars(originals):
    text = (ROOT / "params.yaml").read_text()
    given = "".join(f"      - {{url: 'file://data/{name}', bytes: null, sha256: null}}\n" for name in TARS)
    given = f"    posts: {{url: 'file://data/metadata/posts.json', bytes: null, sha256: null}}\n    tars:\n{given}"
    text = text[: text.index("    database: ")] + given + text[text.index("\nselection:") :]
    ranges = text[text.index("    - {from: 5000000") : text.index("\nfilter:")]
    (originals / "params.yaml").write_text(text.replace(ranges, "    - {from: 0, below: null, draw: all}\n"))
    recipe = params.load(originals / "params.yaml")
    (originals / "supplied").mkdir()
    for stage, *more in (("download",), ("select",), ("filter", "--partial"), ("caption",)):
        done = subprocess.run(
            [sys.executable, ROOT / "stages" / f"{stage}.py", *more],
            cwd=originals,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert recipe.download.inputs.keys() == {"posts", "tars"}
    posts = pq.read_table(originals / "build" / "posts.parquet")
    assert dict(zip(posts["post_id"].to_pylist(), posts["tar"].to_pylist(), strict=True)) == KEPT
    texts = pq.read_table(originals / "build" / "captions.parquet")["caption"].to_pylist()
    expected = captions.caption_posts(Database(originals / "a.db"), list(KEPT), recipe.caption)["caption"].to_pylist()
    assert texts == expected


@pytest.mark.parametrize(
    "names, sentence",
    [
        (["original/data-0001.tar", "recent/data-0001.tar"], "0001.tar and recent/.*1.tar have the same number"),
        (["updates/20240319/a-1.tar", "updates/20240319/b-1.tar"], "a-1.tar and .*b-1.tar have the same number"),
        (["original/data-0001.tar", "more/dataset-1.tar"], "dataset-1.tar is not named like a tar of danbooru2023"),
        (["updates/20240319/dataset-x.tar"], "dataset-x.tar is not named like"),
        (["data-10000.tar"], "data-10000.tar is not named like"),
    ],
)  # fmt: skip
def test_tars_that_cannot_be_told_apart_are_refused(names, sentence):
    with pytest.raises(UserError, match=sentence):
        tar_links.check_names([Path(name) for name in names])


def test_updates_are_ordered_by_date_and_then_by_number(tmp_path):
    names = ["update-20240522-1.tar", "update-20240319-10.tar", "update-20240319-9.tar", "data-2000.tar"]
    for name in names:
        write_tar(tmp_path / name, [])
    found = {number: path.name for number, path in tars.tars_in(tmp_path).items()}
    assert found == {2000: names[3], 10_000: names[2], 10_001: names[1], 10_002: names[0]}


def test_tars_of_one_folder_get_no_links(tmp_path):
    files = [tmp_path / "images" / f"data-{number:04d}.tar" for number in (0, 1000, 2000)]
    assert tar_links.link_into_one_folder(files, ["", "", ""], tmp_path) == files and not any(tmp_path.iterdir())


def test_selected_members_of_this_layout_are_ranges_by_an_index_of_the_same_layout(originals, monkeypatch):
    monkeypatch.setattr(partial_download, "GAP", 512)
    whole = recipe_for(local_inputs())
    _, files = gathered(whole, originals)
    expected = filtered(whole, originals, files)
    with trust_fake_hub(monkeypatch) as hub:
        for name in TARS:
            path = originals / "data" / name
            hub.add(f"datasets/a/b/{name}", path.read_bytes())
            hub.add(f"datasets/a/b_index/{name[:-4]}.json", json.dumps(index(path)).encode(), lfs=False)
        inputs = {
            "posts": local_inputs()["posts"],
            "tars": pinned(f"hf://datasets/a/b@{REVISION}/{name}" for name in TARS),
            "index": pinned(f"hf://datasets/a/b_index@{REVISION}/{name[:-4]}.json" for name in TARS),
        }
        recipe = recipe_for(inputs, "selected")
        ranges = [each.model_copy(update={"from_": 4000}) for each in recipe.selection.ranges]
        recipe = recipe.model_copy(update={"selection": recipe.selection.model_copy(update={"ranges": ranges})})
        recipe = recipe.model_copy(update={"preview": recipe.preview.model_copy(update={"held_out": 0})})
        entries, files = gathered(recipe, originals)
        asked = [path for _, path, *_ in hub.requests("storage")]
    assert {entry["pinned"] for entry in entries["tars"]} == {"members"} and asked
    ours = filtered(recipe, originals, files)
    late = expected[0].filter([post >= 4000 for post in expected[0]["post_id"].to_pylist()])
    assert late.equals(ours[0].filter([post >= 4000 for post in ours[0]["post_id"].to_pylist()]))
    assert {row["reason"] for row in ours[1].to_pylist() if row["post_id"] in (1001, 1002)} == {"unreadable image"}
    for path in files.values():
        assert path.is_symlink() and path.with_suffix(".json").is_symlink()


def test_a_generated_collection_in_this_layout_keeps_the_posts_whose_members_are_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_danbooru, "ADDED", 6_500_000)  # more posts in the updates
    synthetic_danbooru.write(tmp_path / "collection", 600, 5, True)
    synthetic_originals.write_tars(tmp_path / "collection" / "images", tmp_path / "data")
    source = synthetic_originals.write_posts_json(tmp_path / "collection" / "danbooru2023.db", tmp_path / "posts.json")
    posts_json.write_database(source, tmp_path / "a.db")
    paths = sorted((tmp_path / "data").rglob("*.tar"))
    links = tar_links.link_into_one_folder(paths, [str(path) for path in paths], tmp_path)
    recipe = params.load("params.yaml")
    database = Database(tmp_path / "a.db")
    posts, dropped = filtering.filter_posts(
        database, tars.tars_by_number(links), database.post_ids(), recipe.filter, recipe.caption
    )
    assert posts.num_rows + dropped.num_rows == 600 and posts.num_rows > 250
    kinds = synthetic_originals.KINDS
    assert {kinds[post // 1000 % len(kinds)] for post in posts["post_id"].to_pylist()} == {"jpg", "jpeg", "png"}
    assert any(name.startswith("update-") for name in posts["tar"].to_pylist())
