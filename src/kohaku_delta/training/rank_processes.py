"""Starts the ranks with torchrun's launcher. A rank that fails ends the others, and its error is printed last."""

import ctypes
import logging
import os
import signal
import sys

from kohaku_delta.errors import UserError

# Seconds for the current step to end and be saved: a step of the release takes 51; torchrun's default is 30.
PATIENCE = 600
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent() -> None:
    """If the launcher is killed, this rank gets SIGTERM instead of continuing as an orphan."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch_ranks(count: int, arguments: list[str]) -> None:
    """Run this same command as `count` ranks on this machine (gloo or NCCL over the loopback) and wait for them.

    Raises UserError that names the first rank that failed, or the signal that stopped this process.
    """
    from torch.distributed.elastic.agent.server import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in ("torch.distributed.elastic", api.__name__):  # the second has a level of its own
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # Otherwise gloo and the agent resolve the host's name and listen on the address that they get.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # A rank is started as a script again: it needs the first entry of its sys.path, which the stage replaces.
    os.environ.pop("PYTHONSAFEPATH", None)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="train",
        max_restarts=0,
        monitor_interval=0.5,
        shutdown_timeout=PATIENCE,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(config, sys.executable)("-u", os.path.abspath(sys.argv[0]), *arguments)
    except SignalException as signalled:
        raise UserError(
            f"Stopped by {signalled.sigval.name}. Saved steps are kept; run the stage again to go on."
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ended = (
            f"was killed by {signal.Signals(-failure.exitcode).name}"
            if failure.exitcode < 0
            else f"ended with exit code {failure.exitcode}; its error is printed above"
        )
        raise UserError(f"Rank {rank} {ended}. The others were stopped; saved steps are kept.") from None
