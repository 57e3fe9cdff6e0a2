"""Training computed anew: what is true is found equal; what was changed is found at its step, lane and tensor. Workers
and fingerprints move nothing.
"""

import copy
import json
import math
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

import tiny_training
from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.training import journal, tensor_fingerprints
from kohaku_delta.verify import check_replay as replay_checks
from kohaku_delta.verify import replay_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A lesson of three steps or so that keeps the state of every step, and the LoKr of every second."""
    folder = tiny_training.write(tmp_path_factory.mktemp("lesson"), 24, keep_states=100, milestone_every=2)
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def replay(folder, *arguments):
    code = "from kohaku_delta.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "replay", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tiny_training.ROOT}/src", "PATH": ""},
    )


def rewrite(folder, change):
    """The journal with changed rows, chained anew: what a forger would hand out."""
    original = journal.read_journal(folder / "build" / "journal.parquet")
    rows = [{name: value for name, value in row.items() if name != "chain"} for row in copy.deepcopy(original.rows)]
    change(rows)
    forged = journal.Journal(original.header)
    for row in rows:
        forged.append(row)
    forged.write(folder / "build" / "journal.parquet")


@pytest.mark.ci
def test_an_honest_stretch_is_equal_from_a_state_and_from_the_start(trained):
    steps = tiny_training.journal(trained).num_rows
    done = replay(trained, "--from", steps - 1, "--to", steps - 1)
    assert done.returncode == 0 and f"equal: 1 steps, {steps - 1} to {steps - 1}" in done.stdout, (
        done.stdout + done.stderr
    )


@pytest.mark.ci
def test_the_journal_of_a_saved_state_is_replayed_too(trained):
    saved = next(trained.glob("work/*/step-00000003")) / "journal.parquet"
    done = replay(trained, "--journal", saved, "--from", 2, "--to", 2)
    assert done.returncode == 0 and "equal: 1 steps, 2 to 2" in done.stdout, done.stdout + done.stderr
    assert "1 of 3 steps" in done.stdout


@pytest.mark.ci
@pytest.mark.parametrize("file", ["state.safetensors", "journal.parquet"])
@pytest.mark.parametrize("how", ["missing", "empty", "a folder"])
def test_a_state_that_cannot_be_read_is_passed_over_and_said(trained, tmp_path, file, how):
    folder = copied(trained, tmp_path)
    rows = journal.read_journal(folder / "build/journal.parquet")
    run, steps = replay_training.nearest_state(folder / "work", rows, 2)
    assert steps == 2
    damaged = run / "step-00000002" / file
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    if how != "missing":
        damaged.write_bytes(b"") if how == "empty" else damaged.mkdir()
    said = []
    assert replay_training.nearest_state(folder / "work", rows, 2, said.append) == (run, 1)
    assert len(said) == 1 and str(damaged.parent) in said[0] and "is passed over" in said[0]


@pytest.mark.ci
def test_a_replay_says_from_where_it_computes_and_refuses_a_folder_of_states_that_does_not_exist(trained):
    done = replay(trained, "--from", 1, "--to", 1)
    assert "1 steps are computed, 1 to 1, from the state after 1 steps in work/" in done.stderr
    done = replay(trained, "--from", 1, "--to", 1, "--work", "nowhere")
    assert done.returncode == 2 and "nowhere is not a folder" in done.stderr


@pytest.mark.slow
def test_a_changed_caption_is_found_at_its_step_lane_and_posts(trained, tmp_path):
    folder = copied(trained, tmp_path)
    row = parquet.read(folder / "build" / "schedule.parquet").to_pylist()[6]
    captions = parquet.read(folder / "build" / "captions.parquet")
    texts = [
        each["caption"] + ", night sky, sunset, star" if each["post_id"] == row["posts"][0] else each["caption"]
        for each in captions.to_pylist()
    ]
    parquet.write(
        captions.set_column(captions.schema.get_field_index("caption"), "caption", pa.array(texts)),
        folder / "build" / "captions.parquet",
    )
    done = replay(folder, "--from", row["step"], "--to", row["step"])
    assert (
        done.returncode == 1
        and f"different: step {row['step']}: lane {row['lane']}, place {row['place']}: the loss of posts" in done.stdout
    ), done.stdout + done.stderr
    assert str(row["posts"][0]) in done.stdout and "one micro-batch differs" in done.stdout


@pytest.mark.ci
def test_a_weight_changed_by_one_bit_in_a_saved_state_is_found_by_name(trained, tmp_path):
    folder = copied(trained, tmp_path)
    file = next(folder.glob("work/*/step-00000001")) / "state.safetensors"
    tensors = load_file(file)
    name = "weights/lora_unet_time_embed_0.lokr_w2"
    tensors[name].reshape(-1).view(np.uint32)[3] ^= 1
    save_file(tensors, file)
    done = replay(folder, "--from", 1, "--to", 1)
    assert (
        done.returncode == 1 and "different: step 0" in done.stdout and "lora_unet_time_embed_0.lokr_w2" in done.stdout
    ), done.stdout + done.stderr


@pytest.mark.slow
def test_a_journal_of_a_training_that_changed_a_weight_is_found_at_that_step_and_tensor(trained, tmp_path):
    """The forger's training put one ulp onto a tensor after step 1 and wrote an unbroken journal of it."""
    folder = copied(trained, tmp_path)
    names = sorted(
        name.removeprefix("weights/")
        for name in load_file(next(folder.glob("work/*/step-00000002")) / "state.safetensors")
        if name.startswith("weights/")
    )

    def change(rows):
        rows[1]["weights"] ^= 1
        marks = bytearray(rows[1]["tensors"])
        marks[names.index("lora_unet_out_2.lokr_w2")] ^= 1
        rows[1]["tensors"] = bytes(marks)

    rewrite(folder, change)
    done = replay(folder, "--from", 1, "--to", 1)
    assert (
        done.returncode == 1
        and "different: step 1: all lanes and the update are equal; lora_unet_out_2.lokr_w2 came out with other bits"
        in done.stdout
    ), done.stdout + done.stderr


def test_a_row_changed_by_hand_breaks_the_chain_there(trained, tmp_path):
    original = journal.read_journal(trained / "build" / "journal.parquet")
    original.rows[1]["losses"][0] += 1
    original.write(tmp_path / "journal.parquet")
    with pytest.raises(UserError, match="the chain breaks at row 1"):
        journal.read_journal(tmp_path / "journal.parquet")


@pytest.mark.slow
def test_losses_from_a_milestone_are_the_journals_and_another_lokrs_are_not(trained, tmp_path):
    milestone = next(trained.glob("work/*/delta-lokr-step00000002.safetensors"))
    done = replay(trained, "--loss-only", "--lokr", milestone)
    assert done.returncode == 0 and "equal within tolerance" in done.stdout, done.stdout + done.stderr
    tensors = load_file(milestone)
    with open(milestone, "rb") as file:
        metadata = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]
    save_file(
        {name: array * 0 if name.endswith("lokr_w2") else array for name, array in tensors.items()},
        tmp_path / "other.safetensors",
        metadata,
    )
    done = replay(trained, "--loss-only", "--lokr", tmp_path / "other.safetensors")
    assert done.returncode == 1 and "different" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_losses_of_another_step_or_another_run_are_outside_the_tolerance(trained, tmp_path):
    """Each is said to be the milestone of step 2 of this run; the other run differs in nothing but train.seed."""
    other = tiny_training.write(tmp_path / "run", 24, seed=7, keep_states=100, milestone_every=1)
    assert tiny_training.run(other).returncode == 0
    same = tiny_training.write(tmp_path / "steps", 24, keep_states=100, milestone_every=1)
    assert tiny_training.run(same).returncode == 0
    right = next(same.glob("work/*/delta-lokr-step00000002.safetensors"))
    with open(right, "rb") as file:
        metadata = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]
    assert replay(trained, "--loss-only", "--lokr", right).returncode == 0
    for wrong in (
        next(same.glob("work/*/delta-lokr-step00000001.safetensors")),
        next(other.glob("work/*/delta-lokr-step00000002.safetensors")),
    ):
        save_file(load_file(wrong), tmp_path / "wrong.safetensors", metadata)
        done = replay(trained, "--loss-only", "--lokr", tmp_path / "wrong.safetensors")
        assert done.returncode == 1 and "different" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visits", "0" * 64, "schedule.parquet has other posts or visits"),
        ("lanes", [5, 8], "lane 1: all losses are equal and the gradient is not"),
        ("gradient_norm", 3.0, "all lanes are equal; the gradient's norm is 2.0"),
        ("learning_rate_text", 0.5, "the text encoders' rate is 0.25"),
        ("scale", 2.0, "the scaler is 1.0"),
        ("optimizer", 9, "the optimizer's state came out with other bits"),
        ("chain", "another", "the journal's earlier rows are of another run"),
    ],
)  # fmt: skip
def test_a_row_that_differs_in_one_thing_is_told_by_that_thing(key, value, message):
    row = {
        "visits": "a" * 64, "losses": [0.5, 0.25], "lanes": [5, 7], "gradient_norm": 2.0, "learning_rate_unet": 0.5,
        "learning_rate_text": 0.25, "scale": 1.0, "weights": 1, "optimizer": 2, "tensors": b"ab", "chain": "one",
    }  # fmt: skip
    batches = [{"lane": 0, "posts": [1]}, {"lane": 1, "posts": [2]}]
    assert replay_training.first_step_difference(row, row, batches, ["x", "y"]) is None
    assert (
        replay_training.first_step_difference(
            row | {"gradient_norm": math.nan}, row | {"gradient_norm": math.nan}, batches, ["x", "y"]
        )
        is None
    ), "a step that overflowed equals itself"
    assert message in replay_training.first_step_difference(row | {key: value}, row, batches, ["x", "y"])


def test_what_a_sample_proves_is_the_rule_of_three():
    """n samples without a find bound a share by about 3/n with 95 % (ln 0.05 = -2.996)."""
    assert "a journal with 5.0 % of its steps false" in replay_training.confidence(
        59, 28_638
    ) and "among all with 0.2 %" in replay_training.confidence(59, 28_638)
    assert "a journal with 1.0 % of its steps false" in replay_training.confidence(299, 28_638)


@pytest.mark.slow
def test_worker_processes_change_no_byte(trained, tmp_path):
    folder = tiny_training.write(tmp_path / "workers", 24, keep_states=100, milestone_every=2, workers=3)
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
def test_an_unfinished_training_of_other_parameters_is_not_mixed_up_and_not_lost(trained, tmp_path):
    folder = copied(trained, tmp_path)
    steps = tiny_training.journal(folder).num_rows
    shutil.rmtree(next(folder.glob(f"work/*/step-{steps:08d}")))
    params = (folder / "params.yaml").read_text()
    assert "tag_dropout: 0.1" in params
    (folder / "params.yaml").write_text(params.replace("tag_dropout: 0.1", "tag_dropout: 0.2"))
    done = tiny_training.run(folder)
    assert (
        done.returncode == 1
        and f"unfinished training, {steps - 1} of {steps} steps" in done.stderr
        and "train.tag_dropout: 0.1 → 0.2" in done.stderr
    ), done.stderr
    (folder / "params.yaml").write_text(params)
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


def test_a_fingerprint_is_the_sum_by_its_definition_whatever_the_length_and_the_order():
    def literal(data: bytes) -> int:
        total, odd = 0, 0x9E3779B97F4A7C15
        for place in range(0, len(data), 8):
            word = int.from_bytes(data[place : place + 8].ljust(8, b"\0"), "little") * odd % 2**64
            signed = word - 2**64 if word >> 63 else word
            total += (2 * (place // 8) + 1) * ((word ^ (signed >> 29)) % 2**64)
        return total % 2**64

    generator = np.random.default_rng(5)
    arrays = {f"t{size}": generator.integers(0, 256, size, dtype=np.uint8) for size in (0, 1, 7, 8, 9, 64, 1001)}
    found = tensor_fingerprints.fingerprints({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert found == {name: literal(array.tobytes()) for name, array in arrays.items()}
    assert tensor_fingerprints.combine(found) == tensor_fingerprints.combine(dict(reversed(found.items())))
    half = torch.arange(9, dtype=torch.float16)
    assert tensor_fingerprints.fingerprints({"h": half})["h"] == literal(half.numpy().tobytes())


def test_a_long_tensor_is_summed_in_pieces_to_the_same_number(monkeypatch):
    tensor = torch.arange(5000, dtype=torch.float32)
    whole = tensor_fingerprints.tensor_fingerprint(tensor).item()
    monkeypatch.setattr(tensor_fingerprints, "WORDS", 17)
    assert tensor_fingerprints.tensor_fingerprint(tensor).item() == whole


def test_the_journals_header_names_the_base_and_the_parameters_and_nothing_of_the_host(trained):
    header = json.loads(pq.read_schema(trained / "build" / "journal.parquet").metadata[b"kohaku_delta"])
    assert (
        len(header["base"]) == 64
        and header["parameters"]["train.seed"] == 1337
        and header["parameters"]["lokr.dim"] == 10000
    )
    assert (
        not {"execution.ranks", "execution.workers", "execution.work", "execution.save_every"}
        & header["parameters"].keys()
    )


def sampled(folder, count, seed=3):
    """What the audit says of a random sample of this lesson's steps."""
    from kohaku_delta import params
    from kohaku_delta.provenance.artifact import Artifact

    lessons = Artifact("lesson", folder, params.load(folder / "params.yaml"), {}, {}, None)
    return replay_checks.check_training(
        lessons, journal.read_journal(folder / "build" / "journal.parquet"), None, count, seed, iter
    )


@pytest.mark.ci
def test_a_forged_journal_with_an_honest_beginning_and_end_is_found_by_the_sample(trained, tmp_path):
    """Every row but one is true, the chain is whole, base and LoKr are the honest ones: only computing the step anew
    shows it.
    """
    steps = tiny_training.journal(trained).num_rows
    untampered_rebuild = sampled(trained, steps)
    assert (
        untampered_rebuild.status == "PASS"
        and f"{steps} steps drawn with seed 3" in untampered_rebuild.message
        and "with 95 % probability" in untampered_rebuild.message
    )
    folder = copied(trained, tmp_path)
    shutil.rmtree(folder / "work")  # a forger hands out no states that give it away
    rewrite(folder, lambda rows: rows[1].update(gradient_norm=rows[1]["gradient_norm"] * 1.5))
    forged = sampled(folder, steps)
    assert forged.status == "FAIL" and "step 1: all lanes are equal; the gradient's norm is" in forged.message


def test_on_foreign_hardware_the_sample_is_of_losses_and_says_that_it_is_weaker(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(replay_checks, "numerics_differences", lambda rebuild: ["gpu", "multiprocessors"])
    found = sampled(trained, 2)
    assert (
        (found.name, found.status) == ("losses", "PASS")
        and "differs from the trainer's in gpu, multiprocessors" in found.message
        and "weaker evidence" in found.message
    )
    shutil.rmtree(copied(trained, tmp_path) / "work")
    assert sampled(tmp_path / "elsewhere", 2).status == "SKIP"


def test_a_record_made_with_another_patch_release_of_python_is_of_the_same_hardware():
    def differences(python: str) -> list[str]:
        record = SimpleNamespace(numerics=numerics.describe("cpu") | {"python": python})
        recipe = SimpleNamespace(train=SimpleNamespace(device="cpu"))
        return replay_checks.numerics_differences(SimpleNamespace(recipe=recipe, records={"train": record}))

    numerics.enforce()
    assert differences("3.11.2") == differences("3.11") == [] and differences("3.12.1") == ["python"]


def test_the_seed_decides_which_steps_are_sampled_and_each_is_as_likely_as_another():
    assert replay_training.sample_steps(58, 58, 1) == list(range(58)) and replay_training.sample_steps(
        58, 5, 1
    ) == replay_training.sample_steps(58, 5, 1) != replay_training.sample_steps(58, 5, 2)
    counts = np.bincount(
        [step for seed in range(2000) for step in replay_training.sample_steps(20, 5, seed)], minlength=20
    )
    assert abs(counts - 500).max() < 5 * math.sqrt(500 * 0.75), "five standard deviations of a fair draw"
