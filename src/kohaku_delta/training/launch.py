"""Invariant: ranks are started by torchrun's own launcher; a rank that ends badly ends the others, and its sentence is the last word."""

import logging
import os
import sys

from kohaku_delta.refusal import Refusal


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def ranks(count: int, arguments: list[str]) -> None:
    """Runs this very command as `count` ranks on this machine (gloo or NCCL over the loopback), and waits for them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(1, 1, count, run_id="train", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.5)
    try:
        elastic_launch(config, sys.executable)("-u", os.path.abspath(sys.argv[0]), *arguments)
    except SignalException as signalled:
        raise Refusal(f"Stopped by {signalled.sigval.name}; the step that was under way was finished and saved. Run the stage again to go on.") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise Refusal(f"Rank {rank} ended with exit code {failure.exitcode}; its words stand above. The others were stopped; saved steps are kept.") from None
