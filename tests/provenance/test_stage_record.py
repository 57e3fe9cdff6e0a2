"""A stage that ran well leaves a record of what it read, wrote and ran on; any other run leaves none; what changed on
the way is in it.
"""

import getpass
import importlib.util
import json
import os
import platform
import shutil

import pytest
from click.testing import CliRunner

import rebuild_factory
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import dvc_yaml, stage_record
from kohaku_delta.provenance.artifact import open_artifact
from kohaku_delta.training import schedule as schedules
from kohaku_delta.verify import check_lock_records


@pytest.fixture(scope="module")
def untampered_rebuild(tmp_path_factory):
    return rebuild_factory.write(tmp_path_factory.mktemp("honest") / "recipe")


@pytest.fixture
def folder(untampered_rebuild, tmp_path_factory, monkeypatch):
    """A finished rebuild without records, in which the stages run."""
    copy = tmp_path_factory.mktemp("evidence") / "recipe"
    shutil.copytree(untampered_rebuild, copy, symlinks=True)
    shutil.rmtree(copy / "build" / "records")
    monkeypatch.chdir(copy)
    return copy


def stage(name, *arguments):
    """Runs a stage script of this recipe, as `python stages/<name>.py` does, in this process."""
    spec = importlib.util.spec_from_file_location(
        f"stage_{name}", os.path.join(os.path.relpath(rebuild_factory.ROOT), "stages", f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return CliRunner().invoke(module.main, list(arguments))


def records_written(folder) -> list[str]:
    return sorted(path.name for path in (folder / "build" / "records").glob("*"))


def test_a_record_says_what_dvc_lock_says_and_more(folder):
    done = stage("schedule")
    assert done.exit_code == 0, done.output
    (name,) = records_written(folder)
    content = json.loads((folder / "build" / "records" / name).read_text())
    rebuild_factory.lock(folder)
    rebuild_factory.records(folder)
    expected = json.loads((folder / "build" / "records" / name).read_text())
    same = ("format", "stage", "command", "inputs", "outputs", "parameters", "parameters_after")
    assert {key: content[key] for key in same} == {key: expected[key] for key in same}
    assert (
        content["libraries"]["click"] == "8.5.1"
        and content["host"]["python"] == platform.python_version()
        and content["times"]["seconds"] >= 0
    )
    assert content["revision"] is None or len(content["revision"]["commit"]) == 40


def test_a_record_names_no_user_no_machine_and_no_place(folder):
    stage("schedule")
    text = (folder / "build" / "records" / records_written(folder)[0]).read_text()
    assert str(folder) not in text and str(rebuild_factory.ROOT) not in text.replace(
        os.path.relpath(rebuild_factory.ROOT), ""
    )
    assert platform.node() not in text and f'"{getpass.getuser()}"' not in text


def test_a_run_with_other_paths_and_a_refused_one_leave_no_record(folder):
    assert stage("schedule", "--out", "elsewhere.parquet").exit_code == 0
    assert stage("schedule", "--params", "nowhere.yaml").exit_code == 1
    (folder / "build" / "posts.parquet").write_bytes(b"no parquet")
    assert stage("schedule").exit_code == 1
    assert records_written(folder) == []


def test_an_input_and_a_parameter_that_change_while_a_stage_runs_are_in_its_record(folder, monkeypatch):
    build = schedules.build_schedule

    def meanwhile(*arguments):
        with open("build/posts.parquet", "ab") as file:
            file.write(b"!")
        params = (folder / "params.yaml").read_text()
        (folder / "params.yaml").write_text(params.replace("seed: 1337", "seed: 7"))
        return build(*arguments)

    monkeypatch.setattr(schedules, "build_schedule", meanwhile)
    assert stage("schedule").exit_code == 0
    rebuild_factory.lock(folder)  # DVC hashes inputs and reads parameters after the command
    with open_artifact(folder) as found:
        finding = check_lock_records.check_unchanged_during_run(found)
        assert (
            finding.status == "FAIL"
            and "build/posts.parquet was changed while schedule ran; "
            "schedule in params.yaml was changed while schedule ran"
            in finding.message
        )
        assert check_lock_records.check_records(found).status == "PASS", "it is the record of that run all the same"


def test_a_stage_that_was_restored_has_no_record_and_one_that_ran_here_finds_its_own_again(folder):
    stage("schedule")
    first = records_written(folder)
    path = folder / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("area: 16384", "area: 4096"))
    rebuild_factory.lock(folder)
    with open_artifact(folder) as found:
        assert "schedule" not in found.records, "the outs of other parameters, from a cache"
    path.write_text(before)
    rebuild_factory.lock(folder)
    with open_artifact(folder) as found:
        assert "schedule" in found.records and records_written(folder) == first


def test_a_record_that_cannot_be_written_does_not_spoil_the_stage(folder):
    (folder / "build" / "records").write_text("in the way")
    done = stage("schedule")
    assert done.exit_code == 0 and "no record was left" in done.output


def test_digests_are_those_of_the_bytes_whatever_the_length(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "PIECE", 16)
    for length in (0, 1, 15, 16, 17, 32, 33, 100):
        (tmp_path / "file").write_bytes(bytes(range(100))[:length])
        expected = rebuild_factory.hashed(tmp_path / "file")
        found = hashing.digest_path(tmp_path / "file")
        assert (found.md5, found.sha256, found.bytes) == (expected["md5"], expected["sha256"], length)
        assert hashing.digest_path(tmp_path / "file", md5=False).sha256 == expected["sha256"]


def test_a_folders_md5_is_dvcs(tmp_path):
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    for name in ("b.txt", "a/c.txt", "a/b/c.txt", "a.txt", "Ä.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    filesystem = LocalFileSystem()
    _, _, tree = build(HashFileDB(filesystem, str(tmp_path / "cache")), str(tmp_path / "out"), filesystem, "md5")
    assert (
        hashing.digest_path(tmp_path / "out").md5
        == tree.hash_info.value
        == rebuild_factory.hashed(tmp_path / "out")["md5"]
    )
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link"):
        hashing.digest_path(tmp_path / "out")


def test_a_record_with_unknown_or_missing_keys_is_refused_by_name(folder):
    stage("schedule")
    path = folder / "build" / "records" / records_written(folder)[0]
    content = json.loads(path.read_text())
    for changed, message in (
        (content | {"trusted": 1}, "trusted is not known"),
        ({key: value for key, value in content.items() if key != "host"}, "the key host is missing"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            stage_record.read_record(path)


def test_the_pipeline_is_read_as_dvc_reads_it(folder):
    locked = rebuild_factory.loaded(rebuild_factory.ROOT / "miniature" / "dvc.lock")["stages"]
    found = dvc_yaml.stage_declarations(rebuild_factory.ROOT / "miniature")
    assert list(found) == list(rebuild_factory.STAGES)
    for name, stage_ in found.items():
        assert stage_.command == locked[name]["cmd"] and sorted(stage_.outs) == sorted(
            each["path"] for each in locked[name]["outs"]
        )
        assert {dep for dep in stage_.deps if dep.startswith("build/")} == {
            each["path"] for each in locked[name]["deps"] if each["path"].startswith("build/")
        }
