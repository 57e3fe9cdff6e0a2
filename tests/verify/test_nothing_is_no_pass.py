"""A check that found nothing to look at is a SKIP, and a comparison of nothing ends with exit code 2: 0 of 0 is neither
a PASS nor equal.
"""

import json
import shutil

import numpy as np
import pytest

import rebuild_factory
from kohaku_delta import params
from kohaku_delta.formats import parquet, safetensors_io
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.training import journal
from kohaku_delta.verify import (
    check_chain,
    check_fidelity,
    check_lock,
    check_lock_inputs,
    check_replay,
    check_training_states,
    replay_training,
)
from kohaku_delta.verify.findings import Finding, Skip, check, summarize
from tampering import ask


def parameter(section, **values):
    def change(folder):
        content = rebuild_factory.loaded(folder / "params.yaml")
        content[section] |= values
        rebuild_factory.dump(folder / "params.yaml", content)

    return change


def empty_tables(folder):
    for name in ("selection", "posts", "dropped", "captions", "schedule"):
        path = folder / "build" / f"{name}.parquet"
        parquet.write(parquet.read(path).slice(0, 0), path)


def empty_lock(folder):
    (folder / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")


def no_milestones(folder):
    parameter("train", milestone_every=1000)(folder)
    for path in (folder / "build" / "milestones").iterdir():
        path.unlink()


def no_last_layer(folder):
    names = {f"lora_te1_text_model_other.lokr_w{number}": np.zeros((4, 4), np.float16) for number in (1, 2)}
    safetensors_io.save(folder / "build" / "delta-lokr.safetensors", names)


def no_losses(folder):
    path = folder / "build" / "journal.parquet"
    honest = journal.read_journal(path)
    forged = journal.Journal(honest.header, lokr=honest.lokr)
    for row in honest.rows:
        forged.append({key: value for key, value in row.items() if key != "chain"} | {"losses": []})
    forged.write(path)


def tars_with_holes_alone(folder):
    parameter("download", images="selected")(folder)
    path = folder / "build" / "inputs.json"
    content = json.loads(path.read_text())
    content["inputs"] = {"tars": content["inputs"]["tars"]}
    path.write_text(json.dumps(content))


def of_journal(check):
    return lambda rebuild: check(rebuild, check_chain.check_journal(rebuild)[1])


EMPTY = {
    "parameters": (empty_lock, check_lock.check_parameters),
    "links": (empty_lock, check_lock.check_links),
    "outputs": (empty_lock, check_lock.check_outputs),
    "posts": (empty_tables, check_chain.check_dataset),
    "micro-batches": (empty_tables, check_chain.check_order),
    "losses": (no_losses, of_journal(check_chain.check_numbers)),
    "milestones": (no_milestones, of_journal(check_training_states.check_milestones)),
    "layers": (no_last_layer, check_fidelity.check_untrained_layer),
    "inputs": (tars_with_holes_alone, lambda rebuild: check_lock_inputs.check_data(rebuild, True)),
}


@pytest.mark.parametrize("what", EMPTY)
def test_a_check_of_nothing_is_skipped(copy, what):
    change, look = EMPTY[what]
    change(copy)
    with open_artifact(copy) as rebuild:
        finding = look(rebuild)
    assert finding.status == "SKIP", finding


@pytest.mark.parametrize("tensors", [{}, {"a": np.zeros(0, np.float16)}])
def test_files_without_numbers_cannot_be_compared(tmp_path, tensors):
    for name in ("a.safetensors", "b.safetensors"):
        safetensors_io.save(tmp_path / name, tensors)
    code, message = ask("tensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 2 and message.startswith("Error: "), message


def test_a_loss_that_is_not_a_number_is_no_equal_one(copy, monkeypatch):
    pair = replay_training.LossPair(0, 0.5, float("nan"))
    monkeypatch.setattr(replay_training, "compare_losses", lambda *arguments: (4, [pair]))
    shutil.copyfile(
        copy / "build" / "milestones" / "delta-lokr-step00000004.safetensors",
        next((copy / "work").glob("*")) / "delta-lokr-step00000004.safetensors",
    )
    with open_artifact(copy) as rebuild:
        finding = check("replay/losses")(check_replay._check_losses)(rebuild, copy, 1, 3, ["device"])
    assert finding.status == "FAIL", finding


def test_a_verdict_needs_to_know_what_was_run():
    passed, skipped = Finding("lock", "outs", "PASS", ""), Finding("lock", "code", "SKIP", "")
    assert summarize([passed])[0] == 0
    code, verdict = summarize([passed, skipped])
    assert code == 2 and "cannot be judged without lock/code" in verdict
    assert summarize([skipped, Finding("lock", "pins", "FAIL", "")])[0] == 1


def test_the_mirror_of_a_target_decides_nothing_when_stages_are_computed_again(copy, untampered_rebuild, tmp_path):
    """Nor does its execution, if the auditor's own folder is named."""
    parameter("download", mirror="/")(copy)
    parameter("execution", work="/", workers=64)(copy)
    own = params.load(untampered_rebuild / "params.yaml")
    with open_artifact(copy) as rebuild:
        for folder, execution in ((untampered_rebuild, own.execution), (copy, rebuild.recipe.execution)):
            recipe = params.load(check_replay._write_params(rebuild, folder, tmp_path))
            assert recipe.download.mirror == "mirror" and recipe.execution == execution
            assert recipe.selection == own.selection and recipe.caption == own.caption
            assert recipe.download.inputs == own.download.inputs
        with pytest.raises(Skip, match="the states there are not read"):
            check_replay._work_folder(rebuild.recipe, rebuild, rebuild.folder)
