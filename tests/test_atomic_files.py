"""A path holds its old content or all of the new one; what a killed writer left is cleared, what a living one writes is
not touched.
"""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from kohaku_delta import atomic_files
from kohaku_delta.errors import UserError

WRITER = """
import sys
from kohaku_delta import atomic_files
path, kind = sys.argv[1:]
if kind == "file":
    with atomic_files.atomic_write(path, "w") as file:
        file.write("x" * 100_000)
        file.flush()
        print("writing", flush=True)
        sys.stdin.read()
else:
    with atomic_files.atomic_dir(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "half").write_text("x")
        print("writing", flush=True)
        sys.stdin.read()
"""


def start_writer(path, kind):
    """A process in the middle of its write; it ends the write when its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


def write(path, kind):
    if kind == "file":
        with atomic_files.atomic_write(path, "w") as file:
            file.write("new")
    else:
        with atomic_files.atomic_dir(path) as folder:
            assert not list(folder.iterdir()), "nothing of another write is in it"
            (folder / "new").write_text("new")


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_writer_killed_in_the_middle_left_is_cleared_by_the_next_write_of_the_path(tmp_path, kind):
    for _ in range(2):
        process = start_writer(tmp_path / "out", kind)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == [".out.0.aside"], "one left-over, however often"
    write(tmp_path / "out", kind)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "new" if kind == "file" else names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_processes_that_write_one_path_do_not_disturb_each_other(tmp_path, kind):
    process = start_writer(tmp_path / "out", kind)
    write(tmp_path / "out", kind)
    assert names(tmp_path) == [".out.0.aside", "out"]
    assert (tmp_path / "out").read_text() == "new" if kind == "file" else names(tmp_path / "out") == ["new"]
    process.communicate("")
    assert process.returncode == 0 and names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "x" * 100_000 if kind == "file" else names(tmp_path / "out") == ["sub"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, kind):
    write(tmp_path / "out", kind)
    before = names(tmp_path / "out") if kind == "folder" else (tmp_path / "out").read_text()
    context = atomic_files.atomic_write if kind == "file" else atomic_files.atomic_dir
    with pytest.raises(RuntimeError), context(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert before == (names(tmp_path / "out") if kind == "folder" else (tmp_path / "out").read_text())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, kind, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out", kind)
    write(tmp_path / "out", kind)
    assert names(tmp_path) == ["out"]


def test_new_files_have_the_modes_of_ordinary_ones(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write(tmp_path / "out", "file")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_folder_with_a_file_of_another_kind_is_never_replaced(tmp_path):
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    (tmp_path / "pictures" / "sub" / "mine.png").write_text("mine")
    with (
        pytest.raises(UserError, match="holds sub/mine.png, which was not written by this command"),
        atomic_files.atomic_dir(tmp_path / "pictures", {"new"}.__contains__),
    ):
        pytest.fail("it is refused before anything is written")
    assert names(tmp_path) == ["pictures"] and (tmp_path / "pictures" / "sub" / "mine.png").read_text() == "mine"


@pytest.mark.parametrize("path", [".", "..", "../work", "/"])
def test_the_working_folder_and_those_around_it_are_never_replaced(tmp_path, monkeypatch, path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state").write_text("weeks")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UserError, match="in which this command runs, or one around it"), atomic_files.atomic_dir(path):
        pytest.fail("it is refused before anything is written")
    assert names(tmp_path) == ["work"] and names(tmp_path / "work") == ["state"]


def test_a_link_to_a_folder_stays_and_the_folder_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "out", "folder")
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk" / "out") == ["new"]
    assert names(tmp_path / "disk") == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_path_of_the_other_kind_is_refused_before_anything_is_written(tmp_path, kind):
    (tmp_path / "out").mkdir() if kind == "file" else (tmp_path / "out").write_text("mine")
    with pytest.raises(IsADirectoryError if kind == "file" else NotADirectoryError) as error:
        write(tmp_path / "out", kind)
    assert error.value.filename == str(tmp_path / "out") and names(tmp_path) == ["out"]


def test_an_old_folder_is_whole_until_the_new_one_is_there(tmp_path, monkeypatch):
    write(tmp_path / "out", "folder")
    rename = os.rename

    def fail(source, target):
        if str(target) == str(tmp_path / "out") and ".0." in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_files.atomic_dir(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]
