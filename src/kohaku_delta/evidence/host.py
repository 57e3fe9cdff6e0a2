"""Invariant: what is told of a host is what may explain other bits or other times; its name, its user and its paths are not told."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

IMAGE = "KOHAKU_IMAGE"  # the container image's digest, which the image itself cannot know: its runner sets it
TOLD = ("LANG", "LC_ALL", "TZ", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES")


def description() -> dict[str, str]:
    """Processor, memory, system and what of the environment programs listen to."""
    found = {
        "processor": _processor(),
        "processors": str(len(os.sched_getaffinity(0))),
        "memory_mib": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
    }
    return found | {name: os.environ[name] for name in TOLD if name in os.environ}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def container() -> str | None:
    """The digest of the container image, where its runner labelled it."""
    return os.environ.get(IMAGE) or None


def libraries(names: Iterable[str]) -> dict[str, str]:
    """Canonical name → installed version of each distribution ("" if it is not installed)."""
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in metadata.distributions() if each.metadata["Name"]}
    return {name: installed.get(name, "") for name in names}


def numerics(device: str) -> dict[str, str] | None:
    """The contract that this process holds; None for a stage that computes nothing with it (it never loaded it)."""
    held = sys.modules.get("kohaku_delta.numerics")
    return held.contract(device) if held and "torch" in sys.modules else None


def confinement() -> str | None:
    """What holds this process to what its stage declares; None where nothing does."""
    said = sys.modules.get("kohaku_delta.hermetic")  # it imports this room: where a record is left lies open
    return said.layers() if said and said.watch.held()[0] else None


def revision(root: Path, files: list[Path]) -> dict[str, str | bool] | None:
    """The commit at hand, and whether any of `files` differs from it. None without git or a repository."""

    def git(*arguments) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *(str(file.resolve()) for file in files)))}
    except (OSError, subprocess.CalledProcessError):
        return None
