"""kohaku-delta compare: equal rebuilds say so in one line; others are told by the first post, caption, micro-batch,
step and tensor where they part.
"""

import json
import shutil

import pytest

import rebuild_factory
from kohaku_delta.training import journal
from tampering import ask, caption, journaled, locked, picture, post, rehash_everything, truncate_journal, ulp


def test_equal_rebuilds_say_so_in_one_line(untampered_rebuild, copy):
    assert ask("compare", untampered_rebuild, copy) == (0, "equal: all 35 outputs of 13 stages, byte for byte\n")


def test_of_weights_that_a_bundle_leaves_out_it_is_said_that_they_are_only_claimed(untampered_rebuild, copy):
    ask("bundle", copy.parent / "b.tar", "--recipe", copy)
    for one in (untampered_rebuild, copy.parent / "b.tar"):
        code, message = ask("compare", one, copy.parent / "b.tar")
        assert code == 0 and message.startswith("equal: 30 outputs of 13 stages, byte for byte; weights that are only")
        assert message.endswith(
            "only claimed to be equal, by dvc.lock: build/delta-base.safetensors, build/delta-lokr.safetensors, "
            "build/milestones, build/kohaku-xl-delta.safetensors, build/diffusers\n"
        )
    locked(copy, lambda stages: stages["bake"]["outs"][0].update(md5="1" * 32))
    (copy / "build" / "kohaku-xl-delta.safetensors").unlink()
    ask("bundle", copy.parent / "c.tar", "--recipe", copy)
    code, message = ask("compare", untampered_rebuild, copy.parent / "c.tar")
    assert code == 1 and "different from the stage bake on: build/kohaku-xl-delta.safetensors" in message


def emptied(name):
    def change(folder):
        shutil.rmtree(folder / "build" / name)
        (folder / "build" / name).mkdir()

    return change


def without_stage(folder):
    locked(folder, lambda stages: stages.pop("preview"))


def undeclared_stage(folder):
    without_stage(folder)
    pipeline = rebuild_factory.loaded(folder / "dvc.yaml")
    del pipeline["stages"]["preview"]
    rebuild_factory.dump(folder / "dvc.yaml", pipeline)


ABSENT = {  # what is missing → (change, words)
    "all outputs": (lambda folder: shutil.rmtree(folder / "build"), "are 0 outputs of 13 stages"),
    "the final model": (
        lambda folder: (folder / "build" / "kohaku-xl-delta.safetensors").unlink(),
        "cannot be judged: not hashed on both sides: build/kohaku-xl-delta.safetensors; equal, byte for byte, are 34",
    ),
    "the files of a folder": (emptied("diffusers"), "not hashed on both sides: build/diffusers"),
    "a folder": (lambda folder: shutil.rmtree(folder / "build" / "samples"), "on both sides: build/samples"),
    "a stage": (without_stage, "no stage preview in either dvc.lock"),
    "a stage that dvc.yaml does not declare": (undeclared_stage, "no stage preview in either dvc.lock"),
}


@pytest.mark.parametrize("what", ABSENT)
def test_what_is_absent_is_not_equal(untampered_rebuild, copy, what):
    """On both sides, and on one of them."""
    change, words = ABSENT[what]
    change(copy)
    sides = (
        [(copy, copy)] if "stage" in what else [(copy, copy), (untampered_rebuild, copy), (copy, untampered_rebuild)]
    )
    for one, other in sides:
        code, message = ask("compare", one, other)
        assert code == 2 and words in message and message.startswith("cannot be judged"), message


def test_a_bundle_without_outputs_is_equal_to_nothing(untampered_rebuild, copy):
    """Its list says that all were left out."""
    ask("bundle", copy.parent / "b", "--recipe", copy)
    manifest = json.loads((copy.parent / "b" / "bundle.json").read_text())
    lock = rebuild_factory.loaded(copy / "dvc.lock")
    manifest["left_out"] = {out["path"]: out["size"] for stage in lock["stages"].values() for out in stage["outs"]}
    (copy.parent / "b" / "bundle.json").write_text(json.dumps(manifest))
    shutil.rmtree(copy.parent / "b" / "build")
    code, message = ask("compare", untampered_rebuild, copy.parent / "b")
    assert code == 2 and "build/captions.parquet" in message and "are 0 outputs of 13 stages" in message, message


def test_a_folder_that_is_empty_by_both_locks_was_looked_at(copy):
    emptied("milestones")(copy)
    rehash_everything(copy)
    assert ask("compare", copy, copy)[0] == 0


def test_what_differed_on_the_hosts_is_told_of_equal_ones_too(untampered_rebuild, copy):
    rebuild_factory.records(copy, host={"processor": "another"}, container="sha256:" + "1" * 64)
    code, message = ask("compare", untampered_rebuild, copy)
    assert (
        code == 0
        and message.count("\n") == 1
        and "processor: one | another" in message
        and "container: none | sha256:111" in message
    )


@pytest.mark.parametrize(
    ("change", "stage", "lines"),
    [
        (caption, "caption", ["caption      captions.parquet: post ", "general: "]),
        (
            post,
            "filter",
            [
                "post         posts.parquet: post ",
                "is only in the second (30 | 31 rows; 0 posts only in the first, 1 only in the second)",
            ],
        ),
        (
            ulp("kohaku-xl-delta.safetensors"),
            "bake",
            ["kohaku-xl-delta.safetensors: model.diffusion_model.time_embed.2.weight; 1 of 897 tensors differ"],
        ),
        (
            journaled(truncate_journal, True),
            "train",
            ["step         step 3: schedule.parquet has other posts or visits in this step"],
        ),
        (
            journaled(lambda rows: rows[5].update(lanes=[6, 99]), True),
            "train",
            ["step         step 5: lane 1: all losses are equal and the gradient is not"],
        ),
        (
            journaled(lambda rows: rows[2].update(weights=7, tensors=bytes(6)), True),
            "train",
            ["step 2: all lanes and the update are equal; lora_te1_"],
        ),
    ],
)
def test_where_two_rebuilds_part_is_told_by_its_place(untampered_rebuild, copy, change, stage, lines):
    change(copy)
    rehash_everything(copy)
    code, message = ask("compare", untampered_rebuild, copy)
    assert code == 1 and f"different from the stage {stage} on" in message and all(line in message for line in lines), (
        message
    )


def test_two_builds_by_other_code_differ_from_the_code_on(untampered_rebuild, copy):
    path = copy / "build" / "code" / "bake.json"
    path.write_text(path.read_text().replace('"stages/bake.py": "', '"stages/bake.py": "0'))
    rehash_everything(copy)
    code, message = ask("compare", untampered_rebuild, copy)
    assert code == 1 and "different from the stage code on: build/code/bake.json" in message
    assert "\n  code         stages/bake.py\n" in message


def test_a_flipped_pixel_is_told_by_its_input_and_its_step_lane_and_posts(untampered_rebuild, copy):
    """What a rebuild leaves whose data has one other pixel: another tar, and from its step on another journal."""
    picture(copy)
    content = json.loads((copy / "build" / "inputs.json").read_text())
    content["inputs"]["tars"][0]["sha256"] = rebuild_factory.sha256((copy / "mirror" / "data-0004.tar").read_bytes())
    (copy / "build" / "inputs.json").write_text(json.dumps(content))
    journaled(lambda rows: rows[3].update(losses=[rows[3]["losses"][0], 0.75], lanes=[4, 77]), True)(copy)
    rehash_everything(copy)
    code, message = ask("compare", untampered_rebuild, copy)
    posts = next(
        row
        for row in rebuild_factory.parquet.read(copy / "build" / "schedule.parquet").to_pylist()
        if (row["step"], row["place"]) == (3, 1)
    )["posts"]
    assert code == 1 and "different from the stage download on: build/inputs.json" in message
    assert (
        "input        tars, data-0004.tar: " in message
        and f"step 3: lane 1, place 1: the loss of posts {posts[0]}, {posts[1]} is 0.5" in message
        and "the second says 0.75" in message
    )
    assert message.index("input ") < message.index("step ")


def test_other_parameters_are_told_by_name(untampered_rebuild, copy):
    params = copy / "params.yaml"
    params.write_text(params.read_text().replace("tag_dropout: 0.1", "tag_dropout: 0.2"))
    rebuild_factory.lock(copy)
    code, message = ask("compare", untampered_rebuild, copy)
    assert code == 0 and "byte for byte" in message, "what came out is equal"
    journaled(lambda rows: rows[0].update(scale=2.0), True)(copy)
    rebuild_factory.lock(copy)
    code, message = ask("compare", untampered_rebuild, copy)
    assert code == 1 and "parameter    train.tag_dropout: 0.1 | 0.2" in message


def test_what_cannot_be_compared_ends_with_2(untampered_rebuild, copy, tmp_path):
    assert ask("compare", untampered_rebuild, tmp_path / "nowhere")[0] == 2
    (copy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    code, message = ask("compare", untampered_rebuild, copy)
    assert code == 2 and "have no finished stage in common" in message


def test_a_journal_whose_header_differs_is_told_by_its_base(untampered_rebuild, copy):
    path = copy / "build" / "journal.parquet"
    original = journal.read_journal(path)
    other = journal.Journal(original.header | {"base": "0" * 64}, lokr=original.lokr)
    for row in original.rows:
        other.append({key: value for key, value in row.items() if key != "chain"})
    other.write(path)
    rehash_everything(copy)
    code, output = ask("compare", untampered_rebuild, copy)
    assert code == 1 and "the journals begin with other bases" in output
