"""download.images: selected fetches less, and what is made of it is the same."""

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from fake_hub import REVISION, trust_fake_hub
from kohaku_delta.danbooru import partial_download, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import fetch_inputs, filtering, selection
from kohaku_delta.errors import UserError
from kohaku_delta.hub import inputs_manifest
from kohaku_delta.params import Download, Pin, load
from kohaku_delta.preflight import host_checks, host_facts
from kohaku_delta.preflight.host_facts import Host

ROOT = Path(__file__).resolve().parents[2]
REPO, INDEX = "datasets/owner/images", "datasets/owner/images_index"
NAMES = [path.stem for path in sorted((ROOT / "data" / "images").glob("*.tar"))]


def index(path):
    """The public index of a tar, made with Python's own tarfile."""
    data, files = path.read_bytes(), {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                body = data[member.offset_data : member.offset_data + member.size]
                files.setdefault(
                    member.name,
                    {"offset": member.offset_data, "size": member.size, "sha256": hashlib.sha256(body).hexdigest()},
                )
    return {"filesize": len(data), "hash": "0" * 40, "hash_lfs": hashlib.sha256(data).hexdigest(), "files": files}


@pytest.fixture
def hub(monkeypatch):
    """A hub with the miniature's tars and an index of each."""
    monkeypatch.setattr(partial_download, "GAP", 512)
    monkeypatch.setattr(partial_download, "RANGE", 1 << 16)
    with trust_fake_hub(monkeypatch) as hub:
        for name in NAMES:
            path = ROOT / "data" / "images" / f"{name}.tar"
            hub.add(f"{REPO}/images/{name}.tar", path.read_bytes())
            hub.add(f"{INDEX}/images/{name}.json", json.dumps(index(path)).encode(), lfs=False)
        yield hub


@pytest.fixture
def recipe():
    """The miniature with its tars on that hub, and fewer posts drawn."""
    recipe = load(ROOT / "miniature" / "params.yaml")

    def pinned(repo, ending):
        return [Pin(url=f"hf://{repo}@{REVISION}/images/{name}.{ending}", bytes=None, sha256=None) for name in NAMES]

    given = {
        "database": recipe.download.inputs["database"].model_copy(update={"url": f"file://{ROOT}/data/danbooru2023.db"})
    }
    download = Download(
        mirror="mirror", images="selected", inputs=given | {"tars": pinned(REPO, "tar"), "index": pinned(INDEX, "json")}
    )
    ranges = [each.model_copy(update={"draw": 60}) for each in recipe.selection.ranges]
    return recipe.model_copy(
        update={"download": download, "selection": recipe.selection.model_copy(update={"ranges": ranges})}
    )


def fetched(hub):
    """Bytes that were asked for."""
    return sum(
        int(last) - int(first) + 1
        for _, _, _, span, _ in hub.requests("storage")
        for first, last in [span[6:].split("-")]
    )


def kept(folder, recipe, files):
    """posts and dropped of the filter stage, over what is trained on and what is held out."""
    database = Database(ROOT / "data" / "danbooru2023.db")
    chosen = selection.select(database, recipe.selection)["post_id"].to_numpy()
    ids = database.post_ids()
    held_out = selection.held_out(ids, chosen, recipe.preview.seed, recipe.preview.held_out)
    check = recipe.filter.model_copy(update={"image_check": "header"})
    return [
        filtering.filter_posts(database, files, some, check, recipe.caption, folder / "index.parquet")
        for some in (chosen, held_out)
    ]


def gather(recipe, folder):
    inputs_manifest.write(
        fetch_inputs.fetch_inputs(recipe, folder), folder, recipe.merge.start, folder / "build" / "inputs.json"
    )
    return tars.tars_by_number(inputs_manifest.paths(folder / "build" / "inputs.json", "tars"))


def test_selected_members_give_the_same_posts_from_a_part_of_the_bytes(hub, recipe, tmp_path):
    files = gather(recipe, tmp_path)
    whole = tars.tars_in(ROOT / "data" / "images")
    (tmp_path / "whole").mkdir()
    for ours, theirs in zip(kept(tmp_path, recipe, files), kept(tmp_path / "whole", recipe, whole), strict=True):
        assert ours[0].equals(theirs[0]) and ours[1].equals(theirs[1])
        for post in ours[0].to_pylist():
            place = post["tar"], post["offset"], post["size"]
            assert tars.read_member(files[int(post["tar"][5:9])].parent, *place) == tars.read_member(
                ROOT / "data" / "images", *place
            )
    everything = sum(path.stat().st_size for path in whole.values())
    assert 0 < fetched(hub) < 0.4 * everything
    assert sum(path.stat().st_size for path in files.values()) == everything
    assert {len(each[3]) > 0 for each in hub.requests("storage")} == {True}


def test_what_is_there_is_not_fetched_again_and_what_is_damaged_is(hub, recipe, tmp_path):
    files = gather(recipe, tmp_path)
    before, content = len(hub.requests("storage")), (tmp_path / "build" / "inputs.json").read_bytes()
    gather(recipe, tmp_path)
    assert len(hub.requests("storage")) == before and (tmp_path / "build" / "inputs.json").read_bytes() == content
    post = kept(tmp_path, recipe, files)[0][0].to_pylist()[0]
    path = tmp_path / "mirror" / "selected" / "dataset" / "owner" / "images" / REVISION / "images" / post["tar"]
    with open(path, "r+b") as file:
        file.seek(post["offset"] + 20)
        file.write(b"\0\0\0")
    gather(recipe, tmp_path)
    again = hub.requests("storage")[before:]
    assert [each[3] for each in again] == [f"bytes={post['offset']}-{post['offset'] + post['size'] - 1}"]
    assert tars.read_member(path.parent, post["tar"], post["offset"], post["size"]) == tars.read_member(
        ROOT / "data" / "images", post["tar"], post["offset"], post["size"]
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    "faults", [["drop"] * 3, ["corrupt", "corrupt"], [503, 429, 403], ["short"], ["stall"], ["long"], ["whole"]]
)
def test_faults_of_ranges_end_in_the_right_bytes(hub, recipe, tmp_path, faults):
    hub.files[f"{REPO}/images/{NAMES[0]}.tar"].faults = faults
    posts, _ = kept(tmp_path, recipe, gather(recipe, tmp_path))[0]
    assert posts.equals(kept(tmp_path, recipe, tars.tars_in(ROOT / "data" / "images"))[0][0])


def test_members_that_stay_wrong_are_refused(hub, recipe, tmp_path):
    hub.files[f"{REPO}/images/{NAMES[0]}.tar"].faults = ["corrupt"] * 999
    with pytest.raises(
        UserError, match=f"{NAMES[0]}.tar: post [0-9]+ arrived 3 times with other bytes than its index says"
    ):
        gather(recipe, tmp_path)
    assert not (tmp_path / "build").exists()


def test_an_index_of_another_tar_is_refused_before_a_byte_is_fetched(hub, recipe, tmp_path):
    name = f"{INDEX}/images/{NAMES[0]}.json"
    told = json.loads(hub.files[name].data)
    hub.add(name, json.dumps(told | {"hash_lfs": "f" * 64}).encode(), lfs=False)
    with pytest.raises(UserError, match="the hub has the sha256 .* there, the pin says ffff"):
        gather(recipe, tmp_path)
    hub.add(name.replace("0004", "0137"), json.dumps(told | {"filesize": 5}).encode(), lfs=False)
    with pytest.raises(UserError, match="is not the index of"):
        gather(recipe, tmp_path / "other")
    assert hub.requests("storage") == []


@pytest.mark.parametrize("damage", ["tar", "no tar", "members", "length"])
def test_an_index_without_sound_hashes_is_refused(hub, recipe, tmp_path, damage):
    name = f"{INDEX}/images/{NAMES[0]}.json"
    told = json.loads(hub.files[name].data)
    members = {member: entry | {"sha256": "zz"} for member, entry in told["files"].items()}
    told |= {
        "tar": {"hash_lfs": "\x1b[2J"},
        "no tar": {"hash_lfs": None},
        "members": {"files": members},
        "length": {"filesize": -1},
    }[damage]
    hub.add(name, json.dumps(told).encode(), lfs=False)
    with pytest.raises(UserError, match="lacks the sha256|is not the index of") as refusal:
        gather(recipe, tmp_path)
    assert "\x1b" not in refusal.value.message and hub.requests("storage") == []


@pytest.mark.parametrize("images", ["all", "selected"])
@pytest.mark.parametrize(
    "urls, sentence",
    [
        (
            ["original/data-{0000..0999}.tar", "recent/data-{0999..1999}.tar"],
            "original/data-0999.tar and .*recent/data-0999.tar have the same number",
        ),
        (["images/data-{0000..1999}.tar", "more/data-0000.tar"], "images/data-0000.tar and .* have the same number"),
        (["images/0000.tar"], "0000.tar is not named like a tar"),
    ],
)
def test_tars_that_filter_would_refuse_are_refused_before_a_byte_is_fetched(
    hub, recipe, tmp_path, images, urls, sentence
):
    given = [Pin(url=f"hf://datasets/owner/name@{REVISION}/{url}", bytes=None, sha256=None) for url in urls]
    inputs = recipe.download.inputs | {"tars": given}
    download = recipe.download.model_copy(update={"inputs": inputs, "images": images})
    changed = recipe.model_copy(update={"download": download})
    with pytest.raises(UserError, match=sentence):
        fetch_inputs.fetch_inputs(changed, tmp_path)
    assert hub.asked == [] and host_facts._tars_error(changed, tmp_path)
    result = host_checks.check_tars(Host({}, tars=host_facts._tars_error(changed, tmp_path)), changed)
    assert not result.ok and re.search(sentence, result.what)


def test_the_tars_of_both_recipes_are_in_one_folder(tmp_path):
    for name in ("params.yaml", "miniature/params.yaml"):
        assert host_facts._tars_error(load(ROOT / name), (ROOT / name).parent) == ""


def test_selected_without_an_index_says_what_is_missing(recipe, tmp_path):
    given = {name: pin for name, pin in recipe.download.inputs.items() if name != "index"}
    with pytest.raises(UserError, match="download.inputs has no index"):
        fetch_inputs.fetch_inputs(
            recipe.model_copy(update={"download": recipe.download.model_copy(update={"inputs": given})}), tmp_path
        )


def test_a_sparse_tar_takes_the_room_of_its_members(hub, recipe, tmp_path):
    files = gather(recipe, tmp_path)
    assert sum(os.stat(path).st_blocks * 512 for path in files.values()) < sum(
        path.stat().st_size for path in files.values()
    )


def test_a_parent_that_only_the_user_can_bring_is_asked_for_with_the_other_way(tmp_path):
    with pytest.raises(
        UserError,
        match=r"kohakuXLGamma_rev2.safetensors does not exist: gamma is supplied by you \(prefix 38942904e9\)"
        ".*merge.start: published",
    ):
        fetch_inputs.fetch_inputs(load("params.yaml"), tmp_path)
