"""How the training's processes start and end: none outlives the others, and the error that ended them is printed last.

A rank that fails ends the others within GRACE seconds. A request to stop (SIGTERM, SIGINT, SIGHUP) lets the current
step end and be saved; a second SIGTERM or SIGINT ends everything at once.
"""

import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, NoReturn

import click

from kohaku_delta.errors import UserError

# Seconds for the current step to end and be saved: a step of the release takes 51.
PATIENCE = 600
GRACE = 15  # seconds for the other ranks to end after one has failed
REPEATED = 0.2  # seconds: a terminal and a supervisor that both pass on one request are not two requests
LOST, STOPPED = 75, 76  # exit codes of a rank: it lost the others; it was asked to stop, and rank 0 saves
LAUNCHER = "KOHAKU_DELTA_LAUNCHER"  # of a rank that launch_ranks started: the launcher's process id, and a pipe to it
MESSAGE = 60_000  # bytes of an error message: less than a pipe holds
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOPPING = "Stopping after the current step, which is saved. A second Ctrl-C or SIGTERM stops at once, unsaved."
ABANDONED = (
    "Stopped at once: the steps since the last saved state are lost. Run the stage again to go on from that state."
)


class LostRanksError(UserError):
    """Another rank is gone; the cause is that rank's."""

    exit_code = LOST


def is_rank() -> bool:
    """Whether launch_ranks or torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent(number: int, parent: int) -> None:
    """If the process `parent` ends, this child of it gets the signal `number`; if it has ended already, at once."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def watch_signals(stop: Callable[[str], None], again: Callable[[], None]) -> None:
    """From now on SIGTERM, SIGINT and SIGHUP call `stop` with the signal's name, and a later SIGTERM or SIGINT `again`.

    A thread calls them, so that they are heard while the main thread is in C code.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: None)

    def listen() -> None:
        first: float | None = None
        while True:
            number, now = os.read(reader, 1)[0], time.monotonic()
            if number == signal.SIGHUP:
                leave_terminal()
            if number in numbers and first is None:
                first = now
                stop(signal.Signals(number).name)
            elif number in numbers[:2] and first is not None and now - first > REPEATED:
                again()

    threading.Thread(target=listen, daemon=True).start()


def leave_terminal() -> None:
    """The terminal is closed: from now on what is printed goes nowhere, instead of failing the training."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with suppress(OSError):  # it may be closed already
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(null, descriptor)


def write_stderr(line: str) -> None:
    """Write a line to stderr, past Python's buffers and locks, which the main thread may hold."""
    bar = "\n" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{bar}{line}\n".encode())


def stop_at_once() -> NoReturn:
    write_stderr(ABANDONED)
    os._exit(1)


def run(command: click.Command) -> None:
    """Run a stage's command as this process. After an error it waits for nothing: no worker, no thread of gloo or NCCL.

    A rank hands its error to the launcher, which prints it last, and does not outlive it.
    """
    launcher, _, pipe = os.environ.get(LAUNCHER, "").partition(",")
    if is_rank():
        die_with_parent(signal.SIGTERM, int(launcher or os.getppid()))
    try:
        command(standalone_mode=False)
        return
    except click.ClickException as error:
        code = error.exit_code
        with suppress(OSError):
            if pipe:
                os.write(int(pipe), error.format_message().encode()[:MESSAGE])
            else:
                error.show()
    except click.Abort:
        code = 128 + signal.SIGINT
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


class Rank(NamedTuple):
    process: subprocess.Popen
    errors: int  # file descriptor: what the rank says when it fails


class Failure(NamedTuple):
    rank: int
    code: int
    message: str
    is_consequence: bool  # of the failure of another, or of a request to stop

    def describe(self) -> str:
        if self.message:
            cause = f": {self.message}"
        elif self.code >= 0:
            cause = f" ended with exit code {self.code}; its error is printed above."
        elif self.code == -signal.SIGKILL:
            cause = " was killed by SIGKILL. The usual reason is that the machine ran out of memory."
        else:
            cause = f" was killed by {signal.Signals(-self.code).name}."
        kept = "" if "steps are kept" in cause else "; saved steps are kept"
        return f"Rank {self.rank}{cause} The others were stopped{kept}."


def launch_ranks(count: int, arguments: list[str]) -> None:
    """Run this same command as `count` ranks on this machine (gloo or NCCL over the loopback) and wait for them.

    Raises UserError that says why the first rank failed, or that this process was asked to stop.
    """
    from torch.distributed import TCPStore

    # Where the ranks meet. It lives here and not in rank 0, so that its port cannot be taken before it listens.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    requests: list[str] = []

    def stop(name: str) -> None:
        write_stderr(STOPPING)
        requests.append(name)

    watch_signals(stop, lambda: requests.append("again"))
    ranks: list[Rank] = []
    try:
        for rank in range(count):
            ranks.append(_start(rank, count, port, arguments))
        failures = _wait(ranks, requests)
    finally:
        for each in ranks:
            each.process.kill()
        del store
    if "again" in requests:
        raise UserError(ABANDONED)
    first = min(failures, key=lambda failure: failure.is_consequence, default=None)
    if requests and (first is None or first.is_consequence):
        raise UserError(f"Stopped by {requests[0]}. Saved steps are kept; run the stage again to go on.")
    if first:
        message = first.message if requests and first.rank == 0 and first.message else first.describe()
        raise UserError(*message.splitlines())


def _start(rank: int, count: int, port: int, arguments: list[str]) -> Rank:
    errors, writer = os.pipe()
    os.set_blocking(errors, False)
    environment = os.environ | {
        # what torchrun sets
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "train",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # otherwise gloo resolves the host's name and listens on the address that it gets
        "GLOO_SOCKET_IFNAME": "lo",
        LAUNCHER: f"{os.getpid()},{writer}",
    }
    # A rank is started as a script again: it needs the first entry of its sys.path, which the stage replaces.
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-u", os.path.abspath(sys.argv[0]), *arguments]
    try:
        return Rank(subprocess.Popen(command, env=environment, pass_fds=(writer,)), errors)
    finally:
        os.close(writer)


def _wait(ranks: list[Rank], requests: list[str]) -> list[Failure]:
    """Wait until all ranks have ended, and end them if one fails or a person asks. Returns the failures, in order."""
    failures: list[Failure] = []
    running = dict(enumerate(ranks))
    deadline, asked, killed = float("inf"), False, False
    while running:
        now = time.monotonic()
        if requests and not asked:
            asked, deadline = True, min(deadline, now + PATIENCE)
            _signal(running, signal.SIGTERM)
        if not killed and (now > deadline or "again" in requests):
            killed, deadline = True, now + GRACE
            _signal(running, signal.SIGKILL)
        elif killed and now > deadline:  # in the kernel, waiting for a disk or a card
            break
        for rank, (process, errors) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[rank]
            if code in (0, STOPPED):
                continue
            consequences = [LOST]
            if requests or failures:
                consequences += [-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT]
            if killed:
                consequences.append(-signal.SIGKILL)
            message = ""
            with suppress(BlockingIOError):
                message = os.read(errors, MESSAGE).decode(errors="replace")
            failures.append(Failure(rank, code, message, code in consequences))
            if not killed:
                deadline = min(deadline, now + GRACE)
                _signal(running, signal.SIGTERM)
        time.sleep(0.05)
    return failures


def _signal(running: dict[int, Rank], number: signal.Signals) -> None:
    for rank in running.values():
        rank.process.send_signal(number)
