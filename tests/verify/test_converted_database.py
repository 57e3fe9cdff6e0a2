"""The audit takes a database that download made of posts.json for what it is, and nothing else for one."""

import json
from types import SimpleNamespace

import pytest

from kohaku_delta.params import Download, Pin
from kohaku_delta.verify import check_lock_inputs, findings

POSTS = "hf://datasets/owner/name@" + "0" * 40 + "/metadata/posts.json"
CONVERTED = {
    "name": "database",
    "url": f"{POSTS}#danbooru2023.db",
    "bytes": 5,
    "sha256": "b" * 64,
    "pinned": "converted",
}


def finding(tmp_path, **changes):
    pin = Pin(url=POSTS, bytes=9, sha256="a" * 64)
    recipe = SimpleNamespace(
        merge=SimpleNamespace(start="published"),
        download=Download(mirror="mirror", images="all", inputs={"posts": pin}),
    )
    posts = {"name": "posts", "url": POSTS, "bytes": 9, "sha256": "a" * 64, "pinned": "sha256"}
    inputs = [posts, CONVERTED | changes]
    manifest = {each["name"]: {key: each[key] for key in each if key != "name"} | {"path": "p"} for each in inputs}
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "inputs.json").write_text(json.dumps({"inputs": manifest, "start": "published"}))
    return check_lock_inputs.check_pins(SimpleNamespace(recipe=recipe, inputs=inputs, folder=tmp_path))


def test_a_database_made_of_the_pinned_posts_passes(tmp_path):
    found = finding(tmp_path)
    assert found.status == findings.PASS and "2 inputs as pinned, 1 of them by a whole sha256" in found.message


@pytest.mark.parametrize(
    "changes",
    [{"pinned": "sha256"}, {"name": "tars"}, {"url": "file://other.db"}, {"url": "hf://x/y/z#danbooru2023.db"}],
)
def test_another_input_does_not_pass_as_one(tmp_path, changes):
    found = finding(tmp_path, **changes)
    assert found.status == findings.FAIL, found
    assert "is in inputs.json and not pinned" in found.message or "by params.yaml it is “converted”" in found.message
