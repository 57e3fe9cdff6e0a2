"""What this host has, read without changing it. None: not known, as for a host that is only described.

The checks see nothing but a `Host`, so a test can pass any. gpu_probe reads GPUs and libraries in another process.
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

from kohaku_delta.danbooru import posts_json, schema
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import fetch_inputs
from kohaku_delta.errors import UserError
from kohaku_delta.hub import pins
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.preflight import estimates
from kohaku_delta.preflight.parameter_counts import ParameterCounts
from kohaku_delta.provenance import environment, import_closure
from kohaku_delta.training import run_folders

PROBE_TIMEOUT = 300  # seconds; importing torch and diffusers from a cold disk is slow


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes, `architecture` as "8.6"."""

    name: str
    memory: int
    architecture: str | None = None
    multiprocessors: int | None = None


@dataclass(frozen=True)
class DiskFolder:
    """A folder that is written to. Folders of the same `device` share `free` bytes; `present`: bytes already in it."""

    path: str
    device: int
    free: int
    present: int


@dataclass(frozen=True)
class Host:
    """Sizes in bytes. `locked`: versions in the lock; `model`: its sizes, None if unknown.

    `driver`: "" if none answers; `numerics`, `bitsandbytes`, `database`, `tars`, `network_weights`: "" if all is well,
    else what is wrong; `architectures`: what torch was built for ("sm_86"); `missing_inputs`: pinned file:// inputs
    that do not exist.
    """

    locked: dict[str, str]
    model: ParameterCounts | None = None
    python: str | None = None
    missing_tools: tuple[str, ...] | None = None
    libraries: dict[str, str] | None = None
    numerics: str | None = None
    bitsandbytes: str | None = None
    gpus: tuple[Gpu, ...] | None = None
    architectures: tuple[str, ...] | None = None
    driver: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    memory: int | None = None
    shared_memory: int | None = None
    folders: dict[str, DiskFolder] | None = None
    missing_inputs: tuple[str, ...] | None = None
    database: str | None = None
    tars: str | None = None
    network_weights: str | None = None


def inspect_host(recipe: Recipe, params: Path) -> Host:
    """This host, as seen from the folder of `params`."""
    folder = params.parent
    found = _probe(params)
    cache = Path(_ask_dvc(folder, "cache", "dir") or folder / recipe.root / ".dvc" / "cache")
    return Host(
        locked=locked_versions(recipe, folder),
        model=ParameterCounts(**found["model"]) if found["model"] else None,
        python=platform.python_version(),
        missing_tools=tuple(tool for tool in ("dvc", "git") if not shutil.which(tool)),
        libraries={
            canonicalize_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()
        },
        numerics=found["numerics"],
        bitsandbytes=found["bitsandbytes"],
        gpus=tuple(Gpu(**gpu) for gpu in found["gpus"]),
        architectures=tuple(found["architectures"]),
        driver=environment.gpu_driver(),
        cuda=found["cuda"],
        nccl=found["nccl"],
        memory=_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        folders=_without_second_copies(
            folder,
            {
                "mirror": _disk_folder(folder / recipe.download.mirror),
                "build": _disk_folder(folder / "build"),
                "cache": _disk_folder(cache),
                "work": _disk_folder(folder / recipe.execution.work, _unfinished_runs(folder / recipe.execution.work)),
            },
        ),
        missing_inputs=_missing_inputs(recipe, folder),
        database=database_error(recipe, folder),
        tars=_tars_error(recipe, folder),
        network_weights=found["network_weights"],
    )


def locked_versions(recipe: Recipe, folder: Path) -> dict[str, str]:
    """The version of each library in the recipe's lock."""
    lock = folder / recipe.root / "requirements" / f"{recipe.requirements}.txt"
    return {name: library.version for name, library in import_closure.locked_libraries(lock).items()}


def _probe(params: Path) -> dict:
    command = [sys.executable, "-P", "-m", "kohaku_delta.preflight.gpu_probe", str(params)]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT, env=variables)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise UserError(
            f"gpu_probe did not answer in {PROBE_TIMEOUT} s. Does `nvidia-smi` answer? "
            "A GPU that hangs needs a restart of the host."
        ) from None
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"gpu_probe could not inspect this host: {lines[-1]}") from None
    if "error" in found:
        raise UserError(found["error"])
    return found


def _ask_dvc(folder: Path, *command: str) -> str:
    """The first line that a DVC command prints in `folder`; "" if it fails."""
    try:
        done = subprocess.run(["dvc", *command], cwd=folder, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _without_second_copies(folder: Path, folders: dict[str, DiskFolder]) -> dict[str, DiskFolder]:
    """Without DVC's cache if it shares the outputs' file system and links them (cache.type), and so needs no room."""
    types = {kind.strip() for kind in _ask_dvc(folder, "config", "cache.type").split(",")}
    linked = types <= {"reflink", "hardlink", "symlink"} and folders["cache"].device == folders["build"].device
    return {name: each for name, each in folders.items() if name != "cache" or not linked}


def _memory() -> int:
    """Main memory in bytes: the machine's, or what a container may use of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def _disk_folder(path: Path, parts: list[Path] | None = None) -> DiskFolder:
    """The file system of a folder, and the bytes that are present in it, or in `parts` of it."""
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    files = (file for part in ([path] if parts is None else parts) if part.is_dir() for file in part.rglob("*"))
    present = sum(file.lstat().st_size for file in files if file.is_file())
    return DiskFolder(str(path), existing.stat().st_dev, shutil.disk_usage(existing).free, present)


def _unfinished_runs(work: Path) -> list[Path]:
    """The folders of the runs that are neither finished nor set aside: training may go on with one of them."""
    return [run.folder for run in run_folders.unfinished_runs(work) if run.inputs]


def _missing_inputs(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    return tuple(
        each.local_path
        for name in dict.fromkeys(name for name, _ in estimates.needed_pins(recipe))
        for each in pins.expand_input(name, recipe.download.inputs[name], folder)
        if each.local_path and not (folder / each.local_path).is_file()
    )


def _tars_error(recipe: Recipe, folder: Path) -> str:
    """Why the filter stage would refuse the tars after their download; "" if it would not."""
    try:
        fetch_inputs.check_tars(recipe, folder)
    except UserError as error:
        return error.message
    return ""


def database_error(recipe: Recipe, folder: Path) -> str | None:
    """Why the select stage would refuse a local database, or download the first lines of a local posts.json; "" if it
    would not; None if there is no local one.
    """
    is_posts = "posts" in recipe.download.inputs
    pin = recipe.download.inputs.get("posts" if is_posts else "database")
    path = folder / pin.local_path if isinstance(pin, Pin) and pin.local_path else None
    if not path or not path.is_file():
        return None
    try:
        if is_posts:
            posts_json.check_beginning(path)
        else:
            schema.check_schema(Database(path))
    except UserError as error:
        return error.message
    return ""
