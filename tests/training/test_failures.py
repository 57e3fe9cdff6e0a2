"""Failures of a training: one error message, a prompt end, no process left behind, no saved step lost."""

import ctypes
import errno
import fcntl
import itertools
import multiprocessing
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import weakref
from pathlib import Path

import pytest
import torch

import tiny_training
from kohaku_delta import numerics
from kohaku_delta.errors import UserError
from kohaku_delta.params import load
from kohaku_delta.training import (
    batch_builder,
    gradient_reduction,
    rank_processes,
    run_folders,
    run_inputs,
    trainer,
    training_context,
)
from kohaku_delta.training.training_loop import TrainingLoop

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # linux/prctl.h, linux/capability.h
POSTS = 48  # six steps or more, enough time to interfere
SOON = 20  # seconds; gloo would wait ten minutes for a lost rank
FAULTY = Path(tiny_training.__file__).with_name("faulty_train.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training that kept the state of every step."""
    folder = tiny_training.write(tmp_path_factory.mktemp("training"), POSTS, keep_states=100)
    done = tiny_training.run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def copy_inputs(trained, tmp_path) -> Path:
    """A copy of the training in another folder, before its first step."""
    shutil.copytree(
        trained,
        tmp_path / "elsewhere",
        ignore=lambda folder, names: [name for name in names if name in (*tiny_training.OUTS, "milestones", "work")],
    )
    return tmp_path / "elsewhere"


def set_execution(folder, **values) -> None:
    """Change numbers in the section execution of params.yaml."""
    content = (folder / "params.yaml").read_text()
    for key, value in values.items():
        content = re.sub(rf"\b{key}: \d+", f"{key}: {value}", content)
    (folder / "params.yaml").write_text(content)


def start(folder, ranks):
    """Start a training, in a process group of its own, and wait until it has done its first step."""
    process = subprocess.Popen(
        tiny_training.command(ranks),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not list(folder.glob("work/*/log.csv")):
        time.sleep(0.02)
    return process


def children(process: int) -> list[int]:
    """The process ids of a process's children: a launcher's ranks, a rank's workers."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has just ended
        return []


def end(process, folder) -> str:
    """Wait for a training to end with exit code 1 and to leave no process. Returns what it printed on stderr."""
    _, output = process.communicate(timeout=SOON)
    deadline = time.monotonic() + SOON
    while processes(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.returncode == 1 and not processes(folder), output
    return output


def steps(folder) -> list[int]:
    return sorted(int(each.name.removeprefix("step-")) for each in folder.glob("work/*/step-*"))


def steps_logged(folder) -> int:
    return sum(path.read_text().count("\n") - 1 for path in folder.glob("work/*/log.csv"))


def processes(folder) -> dict[int, int]:
    """{process id: rank, -1 for the launcher} of every process whose working directory is `folder`."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.readlink(place / "cwd") == str(folder.resolve())
                and (place / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            ):
                ranks = [entry for entry in (place / "environ").read_bytes().split(b"\0") if entry.startswith(b"RANK=")]
                found[int(place.name)] = int(ranks[0][5:]) if ranks else -1
        except OSError:  # it has just ended
            continue
    return found


def assert_error(output: str, *words: str) -> None:
    assert "Traceback" not in output and all(word in output for word in words), output


def mounted(folder, options) -> bool:
    folder.mkdir(exist_ok=True)
    return (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
        == 0
    )


def is_locked(path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.slow
def test_a_second_trainer_of_one_run_is_refused_in_one_line(tmp_path):
    folder = tiny_training.write(tmp_path / "training", 8)
    first = subprocess.Popen(tiny_training.command(1), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not any(map(is_locked, folder.glob("work/*/lock"))):
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    try:
        done = tiny_training.run(folder)
    finally:
        first.kill()
        first.wait()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert_error(done.stderr, "Another training uses work/", "--work")


def drop_root() -> None:
    """Before the trainer starts, drop root's capability to write everywhere; other users do not have it."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)


def test_a_work_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    folder = tiny_training.write(tmp_path / "training", 8)
    (folder / "work").mkdir()
    (folder / "work").chmod(0o555)
    done = subprocess.run(tiny_training.command(1), cwd=folder, capture_output=True, text=True, preexec_fn=drop_root)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert_error(done.stderr, "Permission denied", "at work/", "another path")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_keeps_the_saved_steps_and_training_goes_on_to_the_same_bytes(trained, tmp_path, workers):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=workers)
    if not mounted(folder / "work", "size=4m"):
        pytest.skip("no tmpfs can be mounted here; the test of the limit on file sizes, below, checks the same promise")
    try:
        done = tiny_training.run(folder, ranks=2)
        assert done.returncode == 1
        assert_error(done.stderr, "No space left on device", "Free some space", "Rank 0: ")
        assert steps(folder) == [1, 2] and not list(folder.glob("work/*/.*")) and not processes(folder)
        subprocess.run(["mount", "-o", "remount,size=64m", folder / "work"], check=True)
        assert tiny_training.run(folder).returncode == 0
        assert tiny_training.outs(folder) == tiny_training.outs(trained)
    finally:
        subprocess.run(["umount", folder / "work"], check=True)


@pytest.mark.slow
def test_a_limit_on_file_sizes_keeps_the_saved_steps_and_training_goes_on_to_the_same_bytes(trained, tmp_path):
    folder = copy_inputs(trained, tmp_path)
    shutil.copytree(trained / "work", folder / "work")
    for step in steps(folder)[2:]:
        shutil.rmtree(next(folder.glob(f"work/*/step-{step:08d}")))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(tiny_training.command(1), cwd=folder, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert_error(done.stderr, "File too large")
    assert steps(folder) == [1, 2] and not list(folder.glob("work/*/.*"))
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_within_seconds_and_leaves_no_process(trained, tmp_path, victim):
    folder = copy_inputs(trained, tmp_path)
    process = start(folder, 2)
    ids = {rank: number for number, rank in processes(folder).items()}
    assert ids.keys() == {-1, 0, 1}
    os.kill(ids[victim], signal.SIGKILL)
    _, output = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert_error(
        output, f"Error: Rank {victim} was killed by SIGKILL.", "The others were stopped; saved steps are kept."
    )
    assert not processes(folder)
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_after_the_current_step_however_long_it_takes(trained, tmp_path):
    folder = copy_inputs(trained, tmp_path)
    process = start(folder, 2)
    before = steps(folder)[-1]
    ranks = [number for number, rank in processes(folder).items() if rank >= 0]
    for each in ranks:
        os.kill(each, signal.SIGSTOP)
    process.terminate()
    time.sleep(33)  # a step of the release takes 51 s; that is more than a rank gets if another one has failed
    assert sorted(processes(folder)) == sorted([process.pid, *ranks])
    for each in ranks:
        os.kill(each, signal.SIGCONT)
    _, output = process.communicate(timeout=SOON)
    assert process.returncode == 1
    last = steps(folder)[-1]
    assert_error(output, f"Stopped after step {last} of ", "Run the stage again")
    assert before <= last <= before + 2 and not processes(folder)
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_ranks_do_not_outlive_their_launcher_and_stop_saved(trained, tmp_path, sent):
    folder = copy_inputs(trained, tmp_path)
    process = start(folder, 2)
    process.send_signal(sent)
    process.communicate(timeout=SOON)
    deadline = time.monotonic() + SOON
    while processes(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(folder) and not (folder / "build" / "delta-lokr.safetensors").exists()
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_all_processes_ends_after_the_step_saved(trained, tmp_path, ranks, sent):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=2, save_every=100)
    process = start(folder, ranks)
    assert len(processes(folder)) == 3 if ranks == 1 else 7
    os.killpg(process.pid, sent)
    output = end(process, folder)
    (saved,) = steps(folder)
    assert_error(output, f"Stopped after step {saved} of ", "Run the stage again")
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_closed_terminal_ends_after_the_step_saved(trained, tmp_path, ranks):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=2, save_every=100)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        tiny_training.command(ranks),
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    while process.poll() is None and not list(folder.glob("work/*/log.csv")):
        if select.select([ours], [], [], 0.02)[0]:
            os.read(ours, 1 << 16)
    os.close(ours)
    end(process, folder)
    assert len(steps(folder)) == 1
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_a_second_ctrl_c_ends_everything_at_once_and_says_what_is_lost(trained, tmp_path, ranks, workers):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=workers)
    process = start(folder, ranks)
    if ranks > 1:
        os.kill(children(process.pid)[1], signal.SIGSTOP)  # no step ends any more
        time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    before = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output = end(process, folder)
    assert time.monotonic() - before < 5
    assert_error(output, "A second Ctrl-C or SIGTERM stops at once", "steps since the last saved state are lost")
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (1, 4), (2, 2), (2, 4)])
def test_a_killed_worker_ends_everything_with_the_last_step_saved(trained, tmp_path, ranks, workers):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=workers, save_every=100)
    process = start(folder, ranks)
    trainer = process.pid if ranks == 1 else children(process.pid)[1]
    os.kill(children(trainer)[0], signal.SIGKILL)
    output = end(process, folder)
    assert_error(output, "killed by signal: Killed", "ran out of memory", "fewer execution.workers")
    assert output.count("Error") == 1 and len(steps(folder)) == 1
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
def test_a_rank_that_fails_ends_one_that_cannot_hear_of_it(trained, tmp_path):
    folder = copy_inputs(trained, tmp_path)
    process = start(folder, 2)
    ids = {rank: number for number, rank in processes(folder).items()}
    os.kill(ids[1], signal.SIGSTOP)
    os.kill(ids[0], signal.SIGKILL)
    assert_error(end(process, folder), "Rank 0 was killed by SIGKILL")


@pytest.mark.slow
def test_a_rank_that_pauses_for_ten_seconds_changes_nothing(trained, tmp_path):
    folder = copy_inputs(trained, tmp_path)
    process = start(folder, 2)
    paused = children(process.pid)[1]
    os.kill(paused, signal.SIGSTOP)
    time.sleep(10)
    os.kill(paused, signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0 and tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.slow
def test_stopped_workers_do_not_keep_a_trainer_that_is_told_to_end(trained, tmp_path):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=2)
    process = start(folder, 1)
    for worker in children(process.pid):
        os.kill(worker, signal.SIGSTOP)
    for _ in range(2):
        time.sleep(1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    end(process, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "ranks", "workers", "words"),
    [
        ("exception,0,trainer,2", 1, 2, ("KeyError: 'a fault of the program'", "traceback-rank0.txt")),
        ("exception,1,worker,9", 2, 2, ("Rank 1: The trainer failed", "traceback-rank1.txt")),
        ("picture,1,worker,9", 2, 0, ("Rank 1: Post 7 in data-0000.tar cannot be decoded",)),
        ("picture,1,worker,9", 2, 2, ("Rank 1: Post 7 in data-0000.tar cannot be decoded",)),
        ("read-error,0,worker,9", 1, 2, ("Input/output error", "data-0000.tar")),
        ("gpu-memory,1,trainer,2", 2, 2, ("Rank 1: The GPU's memory is full", "another training with other bits")),
        ("host-memory,0,worker,9", 1, 2, ("The machine's memory is full", "fewer execution.workers")),
        ("segmentation-fault,1,worker,9", 2, 2, ("Rank 1: The loader's workers failed",)),
        ("segmentation-fault,1,trainer,2", 2, 0, ("Rank 1 was killed by SIGSEGV",)),
    ],
)
def test_a_fault_ends_all_processes_with_its_cause_last_and_the_last_step_saved(
    trained, tmp_path, fault, ranks, workers, words
):
    folder = copy_inputs(trained, tmp_path)
    set_execution(folder, workers=workers, save_every=100)
    process = subprocess.Popen(
        [sys.executable, str(FAULTY), "--ranks", str(ranks)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FAULT": fault},
    )
    while process.poll() is None and not list(folder.glob("work/*/log.csv")):
        time.sleep(0.02)
    output = end(process, folder)
    assert_error(output.splitlines()[-1], "Error: ", *words)
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and len(steps(folder)) == 1
    assert tiny_training.run(folder).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.44 GiB. GPU 0 has 23 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled error\nLast error:\nCuda failure 2 'out of memory'"),
    ],
    ids=["torch", "cuBLAS", "CUDA", "NCCL"],
)
def test_a_full_gpu_is_named_whichever_library_meets_it(tmp_path, error):
    with (
        pytest.raises(UserError, match="The GPU's memory is full.*Saved steps are kept") as raised,
        trainer.readable_errors(tmp_path, 0),
        gradient_reduction.collective_errors(),
    ):
        raise error
    assert "\n" not in raised.value.message


@pytest.mark.ci
def test_what_a_failed_step_held_is_freed_before_the_last_step_is_saved(trained, tmp_path, monkeypatch):
    """A full GPU needs some room to compute the fingerprints of what is saved."""
    folder = copy_inputs(trained, tmp_path)
    recipe, build = load(folder / "params.yaml"), folder / "build"
    files = {name: build / f"{name}.parquet" for name in ("posts", "captions", "schedule")}
    files |= {"inputs": build / "inputs.json", "base": build / "delta-base.safetensors"}
    files |= dict.fromkeys(("tokenizer", "tokenizer_2", "tars"))
    numerics.enforce()
    _, tokenizers = run_inputs.load_tokenizers(files)
    loop = TrainingLoop(
        recipe,
        training_context.build_context(recipe, files, tokenizers, run_inputs.tar_paths(files), "cpu"),
        tmp_path / "work",
    )
    held, losses, calls = [], loop.model.losses, itertools.count()

    def fill_the_gpu(batch):
        loss = losses(batch)
        if next(calls) == 6:  # in the second step
            held.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.44 GiB.")
        return loss

    saved = []
    monkeypatch.setattr(loop.model, "losses", fill_the_gpu)
    monkeypatch.setattr(rank_processes, "watch_signals", lambda *_: None)
    monkeypatch.setattr(loop, "save_finished_step", lambda done: saved.append((done, held[0]())))
    with pytest.raises(torch.OutOfMemoryError):
        for _ in loop.run():
            pass
    assert saved == [(1, None)]


def test_a_file_system_without_locks_is_refused_by_the_name_of_the_folder(tmp_path, monkeypatch):
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(UserError, match=f"{tmp_path}/work is on a file system that cannot lock.*--work"):
            run_folders.locked(tmp_path / "work").__enter__()


RANKS = """
import os, signal, sys, time
sys.path[0] = {src!r}
import click
from kohaku_delta.errors import UserError
from kohaku_delta.training import rank_processes
rank_processes.GRACE = 1

@click.command()
@click.argument("do")
def main(do):
    if not rank_processes.is_rank():
        rank_processes.launch_ranks(2, [do])
    elif os.environ["RANK"] == "0":
        rank_processes.watch_signals(lambda name: print(name, flush=True), lambda: None)
        print("started", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP) if do == "freeze" else time.sleep(100)
    elif do == "wait":
        rank_processes.watch_signals(lambda name: None, lambda: None)
        open("listens", "w").close()
        time.sleep(100)
    else:
        time.sleep(0.5)
        raise UserError("The cause.")

rank_processes.run(main)
"""


@pytest.fixture
def ranks(tmp_path):
    """A function that starts two ranks, of which rank 1 does as it is told and rank 0 waits or is frozen."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(src=str(tiny_training.ROOT / "src")))

    def begin(do):
        return subprocess.Popen(
            [sys.executable, str(script), do],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return begin


@pytest.mark.ci
@pytest.mark.parametrize("do", ["fail", "freeze"])
def test_the_launcher_names_the_rank_that_failed_and_ends_the_others(ranks, tmp_path, do):
    output = end(ranks(do), tmp_path)
    assert output == "Error: Rank 1: The cause. The others were stopped; saved steps are kept.\n"


def test_the_launcher_passes_a_request_on_once_and_kills_at_the_second(ranks, tmp_path):
    process = ranks("wait")
    assert process.stdout.readline() == "started\n"
    while process.poll() is None and not (tmp_path / "listens").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.stdout.readline() == "SIGTERM\n"
    time.sleep(1)
    assert process.poll() is None and len(processes(tmp_path)) == 3
    process.terminate()
    assert "steps since the last saved state are lost" in end(process, tmp_path)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal: Killed"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal: Segmentation fault"),
        ("os._exit(3)", "ended with exit code 3"),
    ],
)
def test_a_worker_that_dies_while_it_sends_is_named_by_its_end_and_not_by_its_closed_connection(code, said):
    """The trainer may see the connection close (EOFError) before it can see the worker's end."""
    worker = multiprocessing.get_context("fork").Process(
        target=exec, args=(f"import os, signal, time; time.sleep(0.3); {code}",)
    )
    worker.start()
    assert batch_builder._failure({worker}, EOFError()) == f"worker {worker.pid} {said}"


def test_an_error_of_living_workers_is_said_as_it_is(monkeypatch):
    monkeypatch.setattr(batch_builder, "LONGEST_END", 0.1)
    assert batch_builder._failure(set(), RuntimeError("DataLoader timed out after 600 seconds")) == (
        "DataLoader timed out after 600 seconds"
    )
    assert batch_builder._failure(set(), EOFError()) == "EOFError"


def test_workers_end_although_nobody_closes_the_loader(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED],
        cwd=tmp_path,
        timeout=SOON,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tiny_training.ROOT / "src")},
    )
    assert done.returncode == 1 and done.stderr.endswith("the caller fails\n") and not processes(tmp_path)


UNCLOSED = """
import pyarrow as pa
from kohaku_delta.training import batch_builder

class Builder:
    def batch(self, posts, visits, bucket):
        return batch_builder.Batch(*[batch_builder.torch.zeros(1) for _ in range(7)])

rows = pa.table({"posts": [[1]] * 8, "visits": [[1]] * 8, "width": [8] * 8, "height": [8] * 8})
batches = batch_builder.load_batches(Builder(), rows, list(range(8)), 2)
next(batches)
raise SystemExit("the caller fails")
"""


@pytest.mark.slow
def test_sigkill_of_any_process_at_random_instants_changes_nothing(trained, tmp_path):
    """30 kills: of the launcher, a rank or a worker; 1, 2 or 4 ranks with 0 or 2 workers."""
    numbers = random.Random(int(os.environ.get("KILL_SEED", "1")))
    folder = copy_inputs(trained, tmp_path)
    kills = 0
    while kills < 30:
        ranks = numbers.choice([1, 2, 4])
        set_execution(folder, workers=numbers.choice([0, 2]), save_every=numbers.choice([1, 3]))
        process = subprocess.Popen(
            tiny_training.command(ranks), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        kind, choice = numbers.choice(["launcher", "rank", "worker"]), numbers.random()
        before = steps_logged(folder)
        if numbers.random() < 0.7:  # in a step; otherwise while it starts
            while process.poll() is None and steps_logged(folder) == before:
                time.sleep(0.02)
        time.sleep(numbers.uniform(0, 8))
        trainers = [process.pid] if ranks == 1 else children(process.pid)
        workers = [worker for trainer in trainers for worker in children(trainer)]
        victims = {"launcher": [], "rank": trainers, "worker": workers}[kind] or [process.pid]
        if process.poll() is None:
            os.kill(victims[int(choice * len(victims))], signal.SIGKILL)
            kills += 1
            print(f"{kind} of {ranks} ranks, {len(workers)} workers, after step {steps_logged(folder)}")
        _, output = process.communicate(timeout=4 * SOON)
        assert "Traceback" not in output, output
        deadline = time.monotonic() + 4 * SOON  # ranks without their launcher finish a step
        while processes(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not processes(folder)
        if (folder / "build" / "delta-lokr.safetensors").exists():
            assert tiny_training.outs(folder) == tiny_training.outs(trained)
            shutil.rmtree(folder / "work")
            for name in tiny_training.OUTS:
                (folder / "build" / name).unlink(missing_ok=True)
    set_execution(folder, workers=2)
    assert tiny_training.run(folder, ranks=4).returncode == 0
    assert tiny_training.outs(folder) == tiny_training.outs(trained)
