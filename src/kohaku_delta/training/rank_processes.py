"""Invariant: ranks are started by torchrun's own launcher; a rank that ends badly ends the others, and its sentence is
the last word.
"""

import ctypes
import logging
import os
import signal
import sys

from kohaku_delta.errors import UserError

PATIENCE = 600  # seconds for a step under way to end and be saved; the release's takes 51, torchrun would wait 30
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent() -> None:
    """Ties this rank to its launcher: when that is killed, this process gets SIGTERM instead of going on as an orphan."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch_ranks(count: int, arguments: list[str]) -> None:
    """Runs this very command as `count` ranks on this machine (gloo or NCCL over the loopback), and waits for them."""
    from torch.distributed.elastic.agent.server import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in ("torch.distributed.elastic", api.__name__):  # the second has a level of its own
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ["GLOO_SOCKET_IFNAME"] = (
        "lo"  # else gloo and the agent look up the host's name, and meet at the address that they are told
    )
    os.environ.pop(
        "PYTHONSAFEPATH", None
    )  # a rank is a script again: the first of its paths is the one that the stage changes
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "127.0.0.1"}
    config = LaunchConfig(
        1, 1, count, run_id="train", max_restarts=0, monitor_interval=0.5, shutdown_timeout=PATIENCE, **where
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
            else f"ended with exit code {failure.exitcode}; its words stand above"
        )
        raise UserError(f"Rank {rank} {ended}. The others were stopped; saved steps are kept.") from None
