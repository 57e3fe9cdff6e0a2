"""Each way to hand out a rebuild that is not what it says is found by the check that is meant to find it, by name; and
an untampered_rebuild one raises no alarm.
"""

import hashlib
import json
import shutil

import pytest

import rebuild_factory
from kohaku_delta import params
from kohaku_delta.formats import parquet
from kohaku_delta.training.journal import read_journal
from kohaku_delta.verify import check_outputs, check_replay, findings
from tampering import (
    MILESTONE,
    ask,
    audit,
    caption,
    code_changed_during_run,
    exchanged,
    fabricate_output_hash,
    failed,
    foreign_state,
    journaled,
    later_milestone,
    losses_of_nan,
    no_update,
    other_alpha,
    other_code,
    other_command,
    other_final_model,
    other_norm,
    other_params,
    other_picture,
    other_weights,
    param_changed_during_run,
    picture,
    pin,
    post,
    post_everywhere,
    record_edited,
    record_of_another_run,
    rehash_everything,
    renamed_state,
    repeated,
    stage_cut,
    start_added,
    swapped,
    swapped_in_the_lock,
    truncate_journal,
    ulp,
    undeclared,
)  # fmt: skip

ATTACKS = {
    "an out's hash fabricated in dvc.lock":
        (fabricate_output_hash, False, "lock/outs", "build/kohaku-xl-delta.safetensors (of bake) has md5"),
    "outs swapped between two stages": (swapped, False, "lock/outs", "build/selection.parquet (of select) has md5"),
    "outs swapped, and dvc.lock with them":
        (swapped_in_the_lock, False, "lock/records", "the record of select is of another run: it wrote build/sel"),
    "outs swapped, everything hashed anew":
        (swapped, True, "chain/dataset", "is trained on or dropped, and not selected"),
    "one caption changed": (caption, False, "lock/outs", "build/captions.parquet (of caption) has md5"),
    "one post added": (post, False, "lock/outs", "build/posts.parquet (of filter) has md5"),
    "one post added, everything hashed anew":
        (post, True, "chain/dataset", "is trained on or dropped, and not selected"),
    "one post added to every table, everything hashed anew":
        (post_everywhere, True, "chain/order", "schedule.parquet is not what posts.parquet gives"),
    "the final model changed by an ulp":
        (ulp("kohaku-xl-delta.safetensors"), False, "lock/outs", "build/kohaku-xl-delta.safetensors (of bake) has md5"),
    "the LoKr changed by an ulp, everything hashed anew":
        (ulp("delta-lokr.safetensors"), True, "chain/lokr", "the journal ends with the LoKr"),
    "a milestone changed by an ulp, everything hashed anew":
        (ulp(MILESTONE), True, "chain/milestones", "is not the state saved after 4 steps rounded to float16"),
    "a milestone whose alpha is another, everything hashed anew":
        (other_alpha, True, "chain/milestones", ".alpha is not lokr.alpha"),
    "a milestone of another step, everything hashed anew":
        (later_milestone, True, "chain/milestones", "is not the state saved after 4 steps"),
    "a milestone left out, everything hashed anew":
        (lambda folder: (folder / "build" / MILESTONE).unlink(), True, "chain/milestones", "does not exist"),
    "the base changed by an ulp, everything hashed anew":
        (ulp("delta-base.safetensors"), True, "chain/base", "the journal begins with the base"),
    "a LoKr to start from that the training did not begin with, everything hashed anew":
        (start_added, True, "chain/base", "begins with a new LoKr; build/inputs.json names the LoKr "),
    "a step cut out of the journal":
        (journaled(truncate_journal, False), True, "chain/journal", "the chain breaks at row 3"),
    "a step of the journal repeated": (journaled(repeated, False), True, "chain/journal", "the chain breaks at row 4"),
    "a step cut out, chained anew":
        (journaled(truncate_journal, True), True, "chain/visits", "the journal has 7 steps, the schedule 8"),
    "a step repeated, chained anew":
        (journaled(repeated, True), True, "chain/visits", "the journal has 9 steps, the schedule 8"),
    "two steps exchanged, chained anew":
        (journaled(exchanged, True), True, "chain/visits", "step 2 of the journal visited other posts"),
    "the last weights forged, chained anew":
        (journaled(other_weights, True), True, "lock/work", "the state after step 7 does not belong to this journal"),
    "a step forged, chained anew": (journaled(other_norm, True), True, "lock/work", "does not belong to this journal"),
    "losses of NaN, chained anew":
        (journaled(losses_of_nan, True), True, "chain/numbers", "has losses that are NaN or infinite"),
    "an update that moved nothing, chained anew":
        (journaled(no_update, True), True, "chain/numbers", "left every weight as it was"),
    "another picture under a sample's name":
        (other_picture, True, "chain/samples", "build/samples/base-01.png is not the picture in preview.png"),
    "samples of another checkpoint":
        (other_final_model, True, "chain/samples", "final-00.png names other settings, or another checkpoint"),
    "a record from another run":
        (record_edited("schedule", record_of_another_run), False, "lock/records",
         "the record of schedule is of another run: it wrote build/schedule.parquet"),
    "code changed during a run":
        (record_edited("train", code_changed_during_run), False, "lock/during",
         "training/training_loop.py was changed while train ran"),
    "params.yaml changed during a run":
        (record_edited("train", param_changed_during_run), False, "lock/during",
         "train in params.yaml was changed while train ran"),
    "other code than was run": (other_code, False, "lock/code", "src/kohaku_delta/cli/stage_command.py"),
    "other parameters":
        (other_params, False, "lock/parameters", "train: train in params.yaml is not what dvc.lock says"),
    "other parameters, everything hashed anew": (other_params, True, "chain/trained", "another train.tag_dropout"),
    "an input that is not the pinned one": (pin, True, "lock/pins", "has another size or sha256 than params.yaml pins"),
    "one bit of one picture": (picture, False, "lock/data", "data-0004.tar is not what the download stage verified"),
    "an input left out of dvc.lock":
        (undeclared, False, "lock/pipeline", "caption: dvc.lock and dvc.yaml name other inputs"),
    "another command": (other_command, False, "lock/pipeline", "merge: dvc.lock ran “python elsewhere.py”"),
    "a stage cut out of dvc.lock":
        (stage_cut, False, "lock/pipeline", "build/preview.png exists and dvc.lock has no stage preview"),
    "a saved state of another training":
        (foreign_state, False, "lock/work", "the state after step 3 does not belong to this journal"),
    "a work folder under another name":
        (renamed_state, False, "lock/work", "its name does not follow from its depends.json"),
}  # fmt: skip


def test_an_honest_rebuild_raises_no_alarm_and_what_was_not_looked_at_is_skipped(untampered_rebuild):
    code, found = audit(untampered_rebuild, "--data")
    assert code == 0 and not failed(found)
    assert {name for name, (status, _) in found.items() if status == "SKIP"} == {
        "lock/revision",
        "lock/provenance",
        "release/release",
        "replay/steps",
    }


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_found_by_its_check(copy, attack, monkeypatch):
    change, careful, check, message = ATTACKS[attack]
    for slow in ("check_statistics", "check_final", "check_diffusers"):  # test_bindings has their attacks
        monkeypatch.setattr(check_outputs, slow, lambda *arguments: findings.Finding("chain", "slow", "SKIP", ""))
    change(copy)
    if careful:
        rehash_everything(copy)
    code, found = audit(copy, *(["--data"] if check == "lock/data" else []))
    assert code == 1 and check in failed(found) and message in failed(found)[check], failed(found)
    print(f"{attack} → {check}: {failed(found)[check]}")


@pytest.mark.ci
def test_a_training_that_began_with_a_lokr_is_audited_with_it(copy):
    """A journal and states that name the file pass with it, and are found without it."""
    start_added(copy)
    sha256 = rebuild_factory.sha256(b"a LoKr")
    build_again(copy, sha256)
    code, found = audit(copy)
    assert code == 0 and not failed(found), failed(found)
    assert f"and with the LoKr {sha256[:16]}… of build/inputs.json" in found["chain/base"][1]
    assert found["lock/work"][0] == "PASS" and "belong to the journal" in found["lock/work"][1]
    listed = json.loads((copy / "build" / "inputs.json").read_text())
    del listed["inputs"]["network_weights"]
    (copy / "build" / "inputs.json").write_text(json.dumps(listed))
    rehash_everything(copy)
    found = failed(audit(copy)[1])
    assert f"begins with the LoKr {sha256[:16]}…; build/inputs.json names a new LoKr" in found["chain/base"]


def build_again(folder, start):
    """The training of the factory with another beginning."""
    recipe, build = params.load(folder / "params.yaml"), folder / "build"
    header = read_journal(build / "journal.parquet").header
    shutil.rmtree(folder / "work")
    rows = parquet.read(build / "schedule.parquet")
    rebuild_factory._train(folder, recipe, rows, header["base"], start)
    rehash_everything(folder)


def test_an_out_that_is_not_there_is_never_passed(copy):
    for name in ("journal.parquet", "schedule.parquet", "posts.parquet", "delta-lokr.safetensors", "inputs.json"):
        (copy / "build" / name).unlink()
    code, found = audit(copy)
    assert code == 1 and "does not exist" in found["lock/outs"][1]
    looked_at = {
        "chain/dataset",
        "chain/order",
        "chain/journal",
        "chain/weights",
        "lock/work",
        "lock/pins",
        "lock/data",
        "fidelity/untouched",
    }
    assert {found[name][0] for name in looked_at} == {"SKIP"}


def test_a_stage_without_a_record_is_skipped_by_name(copy):
    next((copy / "build" / "records").glob("merge-*.json")).unlink()
    code, found = audit(copy)
    assert code == 0 and found["lock/unrecorded"] == (
        "SKIP",
        "no record of merge: restored from DVC's cache, or run elsewhere",
    )
    shutil.rmtree(copy / "build" / "records")
    code, found = audit(copy)
    assert code == 0 and {found[name][0] for name in ("lock/records", "lock/during", "chain/stages")} == {"SKIP"}


def test_a_changed_caption_is_found_by_captioning_anew_although_everything_was_hashed_anew(copy, monkeypatch):
    monkeypatch.setattr(check_replay, "STAGES", {name: check_replay.STAGES[name] for name in ("caption", "schedule")})
    code, found = audit(copy, "--stages")
    assert code == 0 and found["replay/caption"][0] == "PASS", found
    assert found["replay/schedule"][0] == "PASS"
    caption(copy)
    rehash_everything(copy)
    code, found = audit(copy, "--stages")
    assert code == 1 and "captions.parquet" in failed(found)["replay/caption"], found


@pytest.mark.ci
def test_a_span_of_files_is_pinned_by_its_list(copy):
    path = copy / "params.yaml"
    tar = copy / "mirror" / "data-0004.tar"
    rows = f"file,bytes,sha256\ndata-0004.tar,{tar.stat().st_size},{rebuild_factory.sha256(tar.read_bytes())}\n"
    content = rebuild_factory.loaded(path)
    content["download"]["inputs"]["tars"] = [
        {
            "url": "file://mirror/data-{0000..2000}.tar",
            "bytes": len(rows),
            "sha256": rebuild_factory.sha256(rows.encode()),
        }
    ]
    rebuild_factory.dump(path, content)
    rehash_everything(copy)
    assert "pins-tars.csv does not exist" in failed(audit(copy)[1])["lock/pins"]
    (copy / "pins-tars.csv").write_text(rows)
    assert not failed(audit(copy)[1])
    code, _ = ask("bundle", copy / "x.tar", "--recipe", copy)
    assert code == 0 and not failed(audit(copy / "x.tar")[1])
    (copy / "pins-tars.csv").write_text(rows.replace("data-0004.tar,5", "data-0004.tar,6"))
    assert "Restore the list that was pinned" in failed(audit(copy)[1])["lock/pins"]
    content["download"]["inputs"]["tars"] = [
        {"url": "file://mirror/data-{0004..0004}.tar", "bytes": None, "sha256": None}
    ]
    rebuild_factory.dump(path, content)
    manifest = json.loads((copy / "build" / "inputs.json").read_text())
    manifest["inputs"]["tars"][0]["pinned"] = "recorded"
    (copy / "build" / "inputs.json").write_text(json.dumps(manifest))
    rehash_everything(copy)
    assert "1 others as the first download recorded them" in audit(copy)[1]["lock/pins"][1]


def test_of_the_states_of_other_trainings_the_nearest_is_named_first(copy):
    caption(copy)
    rehash_everything(copy)
    (near,) = (copy / "work").glob("*/depends.json")
    content = json.loads(near.read_text())
    for number in range(100_000):  # until its name comes first
        listed = content["depends"] | dict.fromkeys(("base", "posts", "schedule"), str(number))
        name = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16]
        if name < near.parent.name:
            break
    (copy / "work" / name).mkdir()
    (copy / "work" / name / "depends.json").write_text(json.dumps(content | {"depends": listed}))
    message = audit(copy)[1]["lock/work"][1]
    assert name < near.parent.name and f"of other runs: {near.parent.name} (captions differs), {name} (" in message, (
        message
    )
