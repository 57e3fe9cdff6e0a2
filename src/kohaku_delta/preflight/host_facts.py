"""Invariant: what is said of a host was read on it; None: not known (a host that is only described). Nothing here
changes the host.

The checks see a `Host` and nothing else, so a test can hand in any. GPUs and libraries are read in another process
(`probe`), which imports torch.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from kohaku_delta.errors import UserError
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.preflight.parameter_counts import ParameterCounts

PATIENCE = 300  # seconds for the probe; on a cold disk torch and diffusers take their time


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory` in bytes, `architecture` as "8.6"."""

    name: str
    memory: int
    architecture: str | None = None
    multiprocessors: int | None = None


@dataclass(frozen=True)
class DiskFolder:
    """A folder that is written to. `device`: folders with the same one share `free`; `there`: bytes that it has
    already.
    """

    path: str
    device: int
    free: int
    there: int


@dataclass(frozen=True)
class Host:
    """Sizes in bytes. `driver`: "" where none answers; `numerics`, `bitsandbytes`: "" where all is well, else a
    sentence.

    `architectures`: what torch was built for ("sm_86"); `supplied`: pinned file:// inputs that are not there;
    `database`: what is wrong with a local database, "" if nothing.
    """

    python: str | None = None
    missing_tools: tuple[str, ...] | None = None
    libraries: dict[str, str] | None = None
    numerics: str | None = None
    bitsandbytes: str | None = None
    cards: tuple[Gpu, ...] | None = None
    architectures: tuple[str, ...] | None = None
    driver: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    memory: int | None = None
    shared_memory: int | None = None
    places: dict[str, DiskFolder] | None = None
    supplied: tuple[str, ...] | None = None
    database: str | None = None


def inspect_host(recipe: Recipe, params: Path) -> tuple[Host, ParameterCounts | None]:
    """This host, seen from the recipe's folder; and the sizes of the model, which the same process counts (None where
    libraries are missing).
    """
    folder = params.parent
    root = (folder / recipe.root).resolve()
    found = _probe(params)
    return Host(
        python=platform.python_version(),
        missing_tools=tuple(tool for tool in ("dvc", "git") if not shutil.which(tool)),
        libraries={
            canonicalize_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()
        },
        numerics=found["numerics"],
        bitsandbytes=found["bitsandbytes"],
        cards=tuple(Gpu(**card) for card in found["cards"]),
        architectures=tuple(found["architectures"]),
        driver=driver(),
        cuda=found["cuda"],
        nccl=found["nccl"],
        memory=_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        places=_places(recipe, folder, root),
        supplied=_supplied(recipe, folder),
        database=_database(recipe, folder),
    ), ParameterCounts(**found["numbers"]) if found["numbers"] else None


def _probe(params: Path) -> dict:
    script = Path(__file__).with_name("gpu_probe.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script), str(params)], capture_output=True, text=True, timeout=PATIENCE
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{script} did not answer in {PATIENCE} s. Does `nvidia-smi` answer? A card that hangs needs a restart of the host."
        ) from None
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()
        raise UserError(
            f"{script} could not look at this host: {said[-1] if said else f'exit code {done.returncode}'}"
        ) from None
    if "refusal" in found:
        raise UserError(found["refusal"])
    return found


def driver() -> str:
    """The NVIDIA driver's version; "" where none answers."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _memory() -> int:
    """Main memory in bytes: the machine's, or what a container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(said)) if said.isdigit() else total


def _places(recipe: Recipe, folder: Path, root: Path) -> dict[str, DiskFolder]:
    cache = root / ".dvc" / "cache"
    paths = {
        "mirror": folder / recipe.download.mirror,
        "build": folder / "build",
        "cache": cache,
        "work": folder / recipe.execution.work,
    }
    return {name: _place(path) for name, path in paths.items()}


def _place(path: Path) -> DiskFolder:
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    there = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    return DiskFolder(str(path), existing.stat().st_dev, shutil.disk_usage(existing).free, there)


def _supplied(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    from kohaku_delta.preflight.size_estimates import wanted_posts

    paths = [pin.url.removeprefix("file://") for _, pin in wanted_posts(recipe) if pin.url.startswith("file://")]
    return tuple(path for path in paths if not (folder / path).is_file())


def _database(recipe: Recipe, folder: Path) -> str | None:
    """What the select stage would refuse a local database for, before anything is downloaded; None if there is no local
    one.
    """
    from kohaku_delta.danbooru import schema
    from kohaku_delta.danbooru.database import Database

    pin = recipe.download.inputs.get("database")
    if (
        not isinstance(pin, Pin)
        or not pin.url.startswith("file://")
        or not (path := folder / pin.url.removeprefix("file://")).is_file()
    ):
        return None
    try:
        schema.check_schema(Database(path))
    except UserError as refusal:
        return refusal.message
    return ""
