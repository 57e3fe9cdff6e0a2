"""Invariant: what is told of a host is what may explain other bits or other times; its name, its user and its paths are
not told.
"""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

IMAGE = "KOHAKU_IMAGE"  # the container image's digest, which the image itself cannot know: its runner sets it
TOLD = ("LANG", "LC_ALL", "TZ", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES")


def host_facts() -> dict[str, str]:
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
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def container_facts() -> str | None:
    """The digest of the container image, where its runner labelled it."""
    return os.environ.get(IMAGE) or None


def libraries(names: Iterable[str]) -> dict[str, str]:
    """Canonical name → installed version of each distribution ("" if it is not installed)."""
    installed: dict[str, str] = {
        canonicalize_name(each.metadata["Name"]): each.version
        for each in metadata.distributions()
        if each.metadata["Name"]
    }
    return {name: installed.get(name, "") for name in names}


def revision(root: Path, files: list[Path]) -> dict[str, str | bool] | None:
    """The commit at hand, and whether any of `files` differs from it. None without git or a repository."""

    def git(*arguments) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", *(str(file.resolve()) for file in files))),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
