"""The facts about a host that may explain other bits or other times. Its name, its user and its paths are left out."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

IMAGE = "KOHAKU_IMAGE"  # the container image's digest, which the image itself cannot know: its runner sets it
VARIABLES = ("LANG", "LC_ALL", "TZ", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES")


def host_facts() -> dict[str, str]:
    """Processor, memory, system, the GPUs' driver, and the environment variables that programs read."""
    facts = {
        "processor": _processor(),
        "processors": str(len(os.sched_getaffinity(0))),
        "memory_mib": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
    }
    if driver := gpu_driver():
        facts["driver"] = driver
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def gpu_driver() -> str:
    """The NVIDIA driver's version; "" if none answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def container_digest() -> str | None:
    """The digest of the container image, if its runner passed it."""
    return os.environ.get(IMAGE) or None


def libraries(names: Iterable[str]) -> dict[str, str]:
    """Canonical name → installed version of each distribution; "" if it is not installed."""
    installed: dict[str, str] = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version
        for distribution in metadata.distributions()
        if distribution.metadata["Name"]
    }
    return {name: installed.get(name, "") for name in names}


def revision(root: Path, files: list[Path]) -> dict[str, Any] | None:
    """{"commit": the current commit, "dirty": whether any of `files` differs}. None without git or repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *(str(file.resolve()) for file in files))
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
