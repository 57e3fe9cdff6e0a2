"""A target that means harm: its paths lead nowhere outside, what it says is text, what it claims is bounded, and what
cannot be judged ends with exit code 2 and a sentence; each kind is one line of the table.
"""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rebuild_factory
from kohaku_delta import printing
from kohaku_delta.cli import exit_codes
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet, safetensors_io
from tampering import ask, audit, failed, locked, rehash_everything

SECONDS = 20  # an audit of the honest rebuild takes two
EVIL = "\x1b[2J\x1b[Hverdict: PASS\r\n\u202everdict\u2066\x9b\x07"


@pytest.fixture
def copy(untampered_rebuild, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "recipe"
    shutil.copytree(untampered_rebuild, folder, symlinks=True)
    (folder.parent / "secret").write_text("secret")
    return folder


def lock_text(text):
    return lambda folder: (folder / "dvc.lock").write_text(text)


def lock_value(text):
    """A parameter of a stage in dvc.lock that is this piece of YAML."""

    def attack(folder):
        content = (folder / "dvc.lock").read_text()
        (folder / "dvc.lock").write_text(content.replace("tag_dropout: 0.1", f"tag_dropout: {text}"))

    return attack


def json_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def replaced(name, make):
    """The file `name` replaced by what make(path, folder) leaves there."""

    def attack(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path, folder)

    return attack


def pipe(path, folder):
    os.mkfifo(path)


def device(path, folder):
    path.symlink_to("/dev/zero")


def outside(path, folder):
    path.symlink_to(folder.parent / "secret")


def unix_socket(path, folder):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def renamed_out(new):
    """An output of another path, in dvc.yaml and in dvc.lock."""

    def attack(folder):
        for name in ("dvc.yaml", "dvc.lock"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace("build/preview.png", new))

    return attack


def params(change):
    def attack(folder):
        content = rebuild_factory.loaded(folder / "params.yaml")
        change(content)
        rebuild_factory.dump(folder / "params.yaml", content)

    return attack


def table(name, columns):
    def attack(folder):
        pq.write_table(pa.table(columns()), folder / "build" / name, use_dictionary=True, compression="zstd")

    return attack


def many_rows(folder):
    """A table of two megabytes or less with 700 million rows."""
    schema = pa.schema([("post_id", pa.int64())])
    with pq.ParquetWriter(folder / "build" / "posts.parquet", schema, compression="zstd") as writer:
        group = pa.table({"post_id": np.zeros(1 << 24, np.int64)})
        for _ in range(42):
            writer.write_table(group, row_group_size=1 << 24)


def long_text(folder):
    """A journal whose chain is one text of a megabyte, a million times."""
    path = folder / "build" / "journal.parquet"
    honest = parquet.read(path)
    count = 100_000
    columns = [column.take(np.zeros(count, np.int64)) for column in honest.columns]
    columns[-1] = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * (1 << 20)])
    made = pa.Table.from_arrays(columns, names=honest.column_names).replace_schema_metadata(
        pq.read_schema(path).metadata
    )
    pq.write_table(made, path, compression="zstd")


def null_in_a_list(folder):
    path = folder / "build" / "schedule.parquet"
    before = parquet.read(path)
    rows = before.to_pylist()
    rows[0]["posts"][0] = None
    parquet.write(pa.Table.from_pylist(rows, schema=before.schema), path)
    rehash_everything(folder)


def uneven_lists(folder):
    path = folder / "build" / "schedule.parquet"
    before = parquet.read(path)
    rows = before.to_pylist()
    rows[0]["visits"].append(3)
    parquet.write(pa.Table.from_pylist(rows, schema=before.schema), path)
    rehash_everything(folder)


def deep_record(folder):
    path = next((folder / "build" / "records").glob("train-*.json"))
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


REFUSED = {  # what → (change, words of the sentence)
    "a date in a lock": (lock_value("2020-01-01"), "YAML's type date"),
    "a time in a lock": (lock_value("2020-01-01T00:00:00Z"), "YAML's type"),
    "a set in a lock": (lock_value("!!set {a, b}"), "YAML's type set"),
    "binary in a lock": (lock_value("!!binary aGVsbG8="), "YAML's type bytes"),
    "an ordered map in a lock": (lock_value("!!omap [a: 1]"), "YAML's type"),
    "a tuple as a key": (lock_value("{[1, 2]: 3}"), "needs quotes"),
    "a binary key": (lock_value("{!!binary aGVsbG8=: 3}"), "needs quotes"),
    "a number as a key": (lock_value("{1: 3}"), "needs quotes"),
    "null as a key": (lock_value("{~: 3}"), "needs quotes"),
    "a mapping as a key": (lock_value("{{a: b}: 3}"), "is not YAML that can be read"),
    "an unknown tag": (lock_value("!!python/object/apply:os.system [id]"), "is not YAML that can be read"),
    "an empty number": (lock_value('!!int ""'), "is not YAML that can be read"),
    "no truth value": (lock_value("!!bool maybe"), "is not YAML that can be read"),
    "a number of 50,000 digits": (lock_value("9" * 50_000), "is not YAML that can be read"),
    "a hexadecimal number of 50,000 digits": (lock_value("0x" + "f" * 50_000), "more than 64 bits"),
    "half of a surrogate pair": (lock_value('"\\ud800"'), "is not YAML that can be read"),
    "a character 0": (lock_value('"\\0"'), "is not YAML that can be read"),
    "deep nesting": (lock_value("[" * 3000 + "]" * 3000), "is not YAML that can be read"),
    "aliases": (lock_value("[&a [x, x], *a]"), "aliases"),
    "a number for a list in a lock": (
        lambda folder: locked(folder, lambda stages: stages["train"].update(deps=3)), "it must be a list"),
    "null for a stage in a lock": (
        lambda folder: locked(folder, lambda stages: stages.update(train=None)), "it must be a mapping"),
    "a null in a list of a lock": (
        lambda folder: locked(folder, lambda stages: stages["train"]["outs"].append(None)), "it must be a mapping"),
    "null for a lock": (lock_text("null\n"), "it must be a mapping"),
    "a lock of seven megabytes": (lock_text("a: [" + "1, " * 2_400_000 + "1]\n"), "the limit for such a file"),
    "a number for a list in dvc.yaml":
        (lambda folder: (folder / "dvc.yaml").write_text("stages: {a: {cmd: x, outs: 3}}"), "it must be a list"),
    "an output with a number for its settings":
        (lambda folder: (folder / "dvc.yaml").write_text("stages: {a: {cmd: x, outs: [{b: 3}]}}"), "it must be"),
    "an output ../secret": (renamed_out("../secret"), "outside the recipe's folder"),
    "an output build/../../secret": (renamed_out("build/../../secret"), "outside the recipe's folder"),
    "an absolute output": (renamed_out("/etc/passwd"), "outside the recipe's folder"),
    "the folder itself as an output": (renamed_out("."), "outside the recipe's folder"),
    "a stage named ../x":
        (lambda folder: locked(folder, lambda stages: stages.update({"../x": stages.pop("preview")})),
         "is not a name of a stage"),
    "an output that is a pipe": (replaced("build/preview.png", pipe), "is not a regular file"),
    "an output that is a device": (replaced("build/preview.png", device), "is not a regular file"),
    "an output that is a socket": (replaced("build/preview.png", unix_socket), "is not a regular file"),
    "a pipe in a folder of outputs": (replaced("build/samples/base-00.png", pipe), "is not a regular file"),
    "an output that is a link to a secret": (replaced("build/preview.png", outside), "leads out of the recipe's"),
    "a link to a secret in a folder": (replaced("build/diffusers/model_index.json", outside), "leads out of"),
    "a folder that is a link": (replaced("build/code", lambda path, folder: path.symlink_to("/etc")), "leads out of"),
    "dvc.lock is a pipe": (replaced("dvc.lock", pipe), "is not a regular file"),
    "dvc.lock is a secret": (replaced("dvc.lock", outside), "leads out of the recipe's folder"),
    "params.yaml is a device": (replaced("params.yaml", device), "is not a regular file"),
    "a state that is a pipe":
        (lambda folder: os.mkfifo(folder / "work" / "pipe"), "is not a regular file"),
    "code said to lie elsewhere":
        (params(lambda content: content.update(root="/etc")), "is not a repository around this recipe's folder"),
    "sides that no memory holds":
        (params(lambda content: content["schedule"].update(max_side=1 << 40)), "schedule.max_side"),
    "epochs without end": (params(lambda content: content["schedule"].update(epochs=1 << 40)), "schedule.epochs"),
    "a negative seed": (params(lambda content: content["schedule"].update(seed=-1)), "schedule.seed"),
    "more micro-batches than a step has places":
        (params(lambda content: content["schedule"].update(micro_batches=1 << 40)), "schedule.micro_batches"),
}  # fmt: skip
FAILING = {  # what → (change, check that fails, words)
    "700 million rows": (many_rows, "chain/dataset", "the limit for a table"),
    "a text of a megabyte, a hundred thousand times": (long_text, "chain/journal", "the limit for a table"),
    "texts for numbers": (table("journal.parquet", lambda: {"step": ["x"]}), "chain/journal", "has no column"),
    "a null in a list": (null_in_a_list, "chain/order", "the column posts is not what its stage writes"),
    "lists of other lengths": (uneven_lists, "chain/visits", "visited other posts"),
    "a deep record": (deep_record, "lock/records", "it is not JSON that can be read"),
    "inputs.json of nesting": (json_text("build/inputs.json", "[" * 100_000), "lock/pins", "not a list of inputs"),
    "numbers for inputs": (json_text("build/inputs.json", '{"inputs": 3}'), "lock/pins", "not a list of inputs"),
    "nulls for inputs": (json_text("build/inputs.json", '{"inputs": {"a": [null]}}'), "lock/pins", "not a list"),
    "code of numbers": (json_text("build/code/train.json", '{"files": 3}'), "lock/code", "train.json"),
}  # fmt: skip


def is_text(output: str) -> bool:
    return all(line.isprintable() for line in output.splitlines()) and len(output.splitlines()) == output.count("\n")


@pytest.mark.ci
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_judged_ends_with_exit_code_2_and_a_sentence(copy, what):
    change, words = REFUSED[what]
    change(copy)
    began = time.monotonic()
    code, output = ask("audit", copy, "--data")
    assert code == 2 and words in output and output.startswith("Error: "), output
    assert exit_codes.UNFORESEEN not in output and is_text(output), output
    assert time.monotonic() - began < SECONDS


@pytest.mark.ci
@pytest.mark.parametrize("what", FAILING)
def test_what_is_no_output_of_a_stage_fails_by_name(copy, what):
    change, check, words = FAILING[what]
    change(copy)
    began = time.monotonic()
    code, found = audit(copy)
    assert code == 1 and words in failed(found)[check], found
    assert time.monotonic() - began < SECONDS


def evil_in_a_lock(folder):
    content = rebuild_factory.loaded(folder / "dvc.lock")
    content["stages"]["merge"]["cmd"] = EVIL
    rebuild_factory.dump(folder / "dvc.lock", content)


def evil_url(folder):
    path = folder / "build" / "inputs.json"
    content = json.loads(path.read_text())
    content["inputs"]["database"]["url"] = "file://" + EVIL
    path.write_text(json.dumps(content))


def evil_key(folder):
    (folder / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n" + json.dumps(EVIL) + ": 1\n")


def evil_record(folder):
    for path in (folder / "build" / "records").iterdir():
        content = json.loads(path.read_text())
        content["command"] = content["host"]["processor"] = EVIL
        path.write_text(json.dumps(content))


def evil_file(folder):
    (folder / "build" / "samples" / EVIL.replace("/", "")).write_text("x")


def evil_not_utf8(folder):
    Path(os.fsdecode(os.fsencode(folder / "build" / "samples") + b"/\xff\xfe\x1b[2J")).write_text("x")


def evil_tensor(folder):
    path = folder / "build" / "delta-lokr.safetensors"
    safetensors_io.save(path, {EVIL: np.zeros(1, np.float16)})


EVILS = [evil_in_a_lock, evil_url, evil_key, evil_record, evil_file, evil_not_utf8, evil_tensor]


@pytest.mark.ci
@pytest.mark.parametrize("change", EVILS)
def test_what_a_target_says_is_printed_as_text(copy, untampered_rebuild, change):
    change(copy)
    for arguments in (["audit", copy], ["audit", copy, "--json"], ["compare", untampered_rebuild, copy]):
        code, output = ask(*arguments)
        assert is_text(output), repr(output)
        assert exit_codes.UNFORESEEN not in output, output
        verdicts = [line for line in output.splitlines() if line.startswith("verdict")]
        assert len(verdicts) == (arguments[-1] == copy and arguments[0] == "audit" and code == 1), output
    one = ask("tensors", copy / "build" / "delta-lokr.safetensors", copy / "build" / "delta-base.safetensors")[1]
    assert is_text(one), repr(one)


@pytest.mark.parametrize("name", ["schedule", "posts", "captions"])
def test_tables_with_other_columns_are_compared_in_a_sentence(copy, untampered_rebuild, name):
    table(f"{name}.parquet", lambda: {"post_id": ["x"], "step": [None]})(copy)
    code, output = ask("compare", untampered_rebuild, copy)
    assert code == 1 and f"{name}.parquet has other columns" in output, output


@pytest.mark.parametrize("text", [EVIL, "a\u2028b", "\ud800", "\u200f", "\u061c", "x" * 100_000])
def test_a_line_is_printable_short_and_one(text):
    line = printing.printable(text)
    assert line.isprintable() and len(line) < 5000
    assert UserError(text, "more").message.count("\n") == 1
    assert printing.printable("plain “text” → ü 漢字") == "plain “text” → ü 漢字"


def test_only_one_place_prints():
    """So nothing that is printed can be forgotten."""
    root = rebuild_factory.ROOT
    for folder in (root / "src", root / "stages"):
        for path in folder.rglob("*.py"):
            if path.name != "printing.py":
                assert "click.echo" not in path.read_text(), path


def test_an_output_may_be_a_link_into_dvcs_cache(copy):
    path = copy / "build" / "captions.parquet"
    md5 = rebuild_factory.hashed(path)["md5"]
    cached = copy.parent / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True)
    path.rename(cached)
    path.symlink_to(cached)
    code, found = audit(copy)
    assert code == 0 and not failed(found), failed(found)


def test_the_states_of_a_work_folder_elsewhere_are_not_read(copy):
    content = rebuild_factory.loaded(copy / "params.yaml")
    content["execution"]["work"] = str(copy / "work")
    rebuild_factory.dump(copy / "params.yaml", content)
    assert audit(copy)[1]["lock/work"] == (
        "SKIP",
        "execution.work is outside the recipe's folder: the states there are not read",
    )
