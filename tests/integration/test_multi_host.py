"""A training on two machines: the same bytes as on one, also if it is stopped and the state is on the other machine.
Machines with different inputs are refused.
"""

import os
import shutil
import signal
import time

import pytest

import network_namespaces
import tiny_training
from kohaku_delta.formats import parquet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training by one process on one machine."""
    folder = tiny_training.write(tmp_path_factory.mktemp("training"), 24)
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hosts(trained, tmp_path):
    """Two machines, each with a copy of the training, and a function that trains on both: (names, folders, train)."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(*tiny_training.OUTS, "work"))
    try:
        with network_namespaces.two() as names:
            yield (
                names,
                folders,
                lambda: [network_namespaces.torchrun(names, node, folder, 2) for node, folder in enumerate(folders)],
            )
    except OSError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")


def wait_for(processes):
    """(exit code, output) of each."""
    outputs = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, out + err) for process, (out, err) in zip(processes, outputs, strict=True)]


def test_two_machines_with_two_ranks_each_give_the_bytes_of_one_process(trained, hosts):
    _, (first, second), train = hosts
    done = wait_for(train())
    assert [code for code, _ in done] == [0, 0], done
    assert tiny_training.outs(first) == tiny_training.outs(trained)
    assert not any((second / "build" / name).exists() for name in tiny_training.OUTS) and not list(
        second.glob("work/*/step-*")
    )
    (log,) = first.glob("work/*/log.csv")
    assert {line.rpartition(",")[2] for line in log.read_text().splitlines()[1:]} == {"4"}
    assert done[0][1].count("train: ") == 1 and "train: " not in done[1][1]
    # what `dvc repro` does afterwards, on the first machine alone: it loads the finished state and repeats no step
    for name in tiny_training.OUTS:
        (first / "build" / name).unlink()
    before = log.read_text()
    assert tiny_training.run(first).returncode == 0
    assert tiny_training.outs(first) == tiny_training.outs(trained) and log.read_text() == before


def test_a_training_goes_on_from_a_state_on_either_machine(trained, hosts):
    _, (first, second), train = hosts
    processes = train()
    while processes[0].poll() is None and not list(first.glob("work/*/step-00000001")):
        time.sleep(0.02)
    processes[1].terminate()  # stop the machine that saves nothing: the other saves, and both end
    done = wait_for(processes)
    states = sorted(path.name for path in first.glob("work/*/step-*"))
    assert states and all(code for code, _ in done) and "Stopped after step" in done[0][1], done
    shutil.rmtree(second / "work", ignore_errors=True)
    shutil.move(first / "work", second / "work")  # now the newest state is on the other machine
    done = wait_for(train())
    assert [code for code, _ in done] == [0, 0], done
    assert tiny_training.outs(first) == tiny_training.outs(trained)
    steps = tiny_training.journal(trained).num_rows
    (log,) = first.glob("work/*/log.csv")
    assert len(log.read_text().splitlines()) - 1 == steps - int(states[-1].removeprefix("step-"))


def test_a_lost_machine_ends_the_others_with_an_error_and_one_machine_finishes(trained, hosts):
    names, (first, _), train = hosts
    processes = train()
    while processes[0].poll() is None and not list(first.glob("work/*/step-00000001")):
        time.sleep(0.02)
    for process in network_namespaces.processes(names[1]):
        os.kill(process, signal.SIGKILL)
    code, output = wait_for(processes)[0]
    assert code and "lost the others" in output and "Saved steps are kept" in output, output
    assert tiny_training.run(first, ranks=2).returncode == 0
    assert tiny_training.outs(first) == tiny_training.outs(trained)


def test_a_machine_with_other_captions_is_refused_by_name_on_every_machine(hosts):
    _, (first, second), train = hosts
    captions = parquet.read(second / "build" / "captions.parquet")
    backwards = captions["caption"].take(list(reversed(range(captions.num_rows))))
    parquet.write(
        captions.set_column(captions.schema.get_field_index("caption"), "caption", backwards),
        second / "build" / "captions.parquet",
    )
    done = wait_for(train())
    assert all(code for code, _ in done)
    assert "cannot train with rank 0: captions differs" in done[1][1], done
    assert "The inputs of rank 2 are not those of rank 0" in done[0][1], done
    assert not any((folder / "build" / name).exists() for folder in (first, second) for name in tiny_training.OUTS)
