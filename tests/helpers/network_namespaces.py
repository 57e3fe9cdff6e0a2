"""Two machines on one: network namespaces joined by a virtual cable, each with its own addresses and no other network.
Linux, root.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29577
CABLE = "cable"  # what both call their end


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two():
    """The names of two namespaces. Raises OSError if this host does not permit them."""
    if not shutil.which("ip"):
        raise OSError("the command `ip` is missing (iproute2)")
    names = [f"kohaku-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as error:
        raise OSError(f"`{' '.join(error.cmd)}` said: {error.stderr.strip()}") from None
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def processes(name: str) -> list[int]:
    """The ids of all that runs in a namespace."""
    return [
        int(word)
        for word in subprocess.run(
            ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
        ).stdout.split()
    ]


def torchrun(names: list[str], node: int, folder: Path, ranks: int) -> subprocess.Popen:
    """Starts `ranks` processes of a training in the folder of machine `node`, with the command of docs/hosts.md."""
    command = [
        *("ip", "netns", "exec", names[node], sys.executable, "-m", "torch.distributed.run"),
        *(
            "--nnodes",
            "2",
            "--nproc-per-node",
            str(ranks),
            "--node-rank",
            str(node),
            "--master-addr",
            ADDRESSES[0],
            "--master-port",
            str(PORT),
        ),
        *("--shutdown-timeout", "600", str(ROOT / "stages" / "train.py")),
    ]
    environment = os.environ | {"PYTHONPATH": "", "GLOO_SOCKET_IFNAME": CABLE}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
