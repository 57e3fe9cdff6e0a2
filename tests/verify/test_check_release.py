"""A rebuild is called the release only where a published figure, hash or tensor is met; where none can be, it is said
why.
"""

import shutil

import pytest

import rebuild_factory
from kohaku_delta import params
from kohaku_delta.formats import parquet
from kohaku_delta.verify.check_fidelity import quirks
from tampering import audit, failed, rehash_everything, ulp

FILES = {"base": "delta-base.safetensors", "lokr": "delta-lokr.safetensors", "final": "kohaku-xl-delta.safetensors"}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A rebuild whose recipe says that it is the release: published is what it made."""
    folder = rebuild_factory.write(tmp_path_factory.mktemp("released") / "recipe")
    content = rebuild_factory.loaded(folder / "params.yaml")
    steps = parquet.read(folder / "build" / "schedule.parquet")["step"][-1].as_py() + 1
    files = {
        name: {"bytes": None, "sha256": rebuild_factory.sha256((folder / "build" / file).read_bytes())}
        for name, file in FILES.items()
    }
    content["published"] = files | {
        "milestones": {"24000": {"bytes": None, "sha256": "0" * 64}, "4": {"bytes": None, "sha256": None}},
        "training": {"gpus": 2, "gpu": "RTX 3090", "seconds_per_step": 1.0, "said": "nothing"},
        "dataset": {"posts": 30, "steps": steps, "buckets": []},
    }
    rebuild_factory.dump(folder / "params.yaml", content)
    rebuild_factory.write_statistics(folder)
    rehash_everything(folder)
    (folder / "published").mkdir()
    for file in FILES.values():
        shutil.copyfile(folder / "build" / file, folder / "published" / file)
    return folder


@pytest.fixture
def copy(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "recipe"
    shutil.copytree(released, folder, symlinks=True)
    return folder


def test_the_published_files_are_passed_by_hash_and_by_tensor(released):
    code, found = audit(released, "--published", released / "published")
    assert code == 0 and {
        found[f"release/{name}"][0] for name in ("counts", *FILES, *(f"tensors of {name}" for name in FILES))
    } == {"PASS"}
    assert "posts (here +0)" in found["release/counts"][1]


def test_other_hashes_are_no_failure_and_it_is_said_why_they_cannot_be_met(copy):
    for name in FILES.values():
        ulp(name)(copy)
    rehash_everything(copy)
    _, found = audit(copy, "--published", copy / "published")
    assert {found[f"release/{name}"][0] for name in FILES} == {"SKIP"}
    assert "header is 6,924 bytes longer" in found["release/base"][1] and "no fixed order" in found["release/final"][1]
    assert (
        found["release/tensors of final"][0] == "SKIP"
        and "1 of 897 tensors differ" in found["release/tensors of final"][1]
    )
    assert found["release/tensors of base"][0] == "FAIL", (
        "the base's tensors are not a matter of order: they can be met, and were not"
    )


@pytest.mark.ci
def test_a_published_hash_that_is_not_known_is_said_and_no_failure(copy):
    content = rebuild_factory.loaded(copy / "params.yaml")
    content["published"]["final"]["sha256"] = None
    rebuild_factory.dump(copy / "params.yaml", content)
    rehash_everything(copy)
    status, message = audit(copy)[1]["release/final"]
    assert status == "SKIP" and "not known (published.final.sha256)" in message


@pytest.mark.ci
def test_other_counts_fail(copy):
    content = rebuild_factory.loaded(copy / "params.yaml")
    content["published"]["dataset"] = {"posts": 31, "steps": 9, "buckets": [[128, 128, 1]]}
    rebuild_factory.dump(copy / "params.yaml", content)
    rebuild_factory.write_statistics(copy)
    rehash_everything(copy)
    faults = failed(audit(copy)[1])
    assert (
        list(faults) == ["release/counts"]
        and "31 posts (here -1)" in faults["release/counts"]
        and "0 of 1 known buckets equal" in faults["release/counts"]
    )


@pytest.mark.ci
def test_what_the_recipe_copies_and_repairs_is_read_from_it(copy):
    path = copy / "params.yaml"
    text = path.read_text()
    assert "repaired by parameter: lokr.forward" in audit(copy)[1]["fidelity/quirks"][1]
    path.write_text(
        text.replace("crop_conditioning: letterbox", "crop_conditioning: real").replace(
            "before_first_year: early", "before_first_year: null"
        )
    )
    message = audit(copy)[1]["fidelity/quirks"][1]
    pixels = "filter.exif_rotation, filter.reencode_webp"
    copied = f"selection.replacement, {pixels}, caption.no_quality_above_id, train.last_step_divisor"
    assert f"copied: {copied}" in message
    assert "repaired by parameter: caption.before_first_year, lokr.forward, train.crop_conditioning" in message


def test_every_key_of_the_fidelity_table_is_told():
    listed = {*quirks(params.load("params.yaml")), "train.warmup_steps"}
    rows = [
        line.split("|")
        for line in (rebuild_factory.ROOT / "docs" / "fidelity.md").read_text().splitlines()
        if line.startswith("| ") and line.count("|") == 4
    ]
    keys = {cells[3].strip(" `").partition(":")[0]: cells[2] for cells in rows}
    copied = {key for key, text in keys.items() if text.strip().startswith("copied")} - {"–"}
    assert copied <= listed <= keys.keys()
    values = quirks(params.load("params.yaml"))
    assert {key for key, value in values.items() if value} | {"train.warmup_steps"} == copied, (
        "the release's recipe copies what the table says"
    )
