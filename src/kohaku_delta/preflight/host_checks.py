"""The check list for a host. A check passes only if what it names was seen and is enough; a failed one has a remedy.

A check that does not concern the recipe, or whose facts are not known (a host that is only described), is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kohaku_delta.params import Recipe
from kohaku_delta.preflight import estimates
from kohaku_delta.preflight.host_facts import Host
from kohaku_delta.training import bitsandbytes_versions
from kohaku_delta.units import format_size


@dataclass(frozen=True)
class CheckResult:
    """One line of the table. `what`: what was found; `remedy`: what to do if it is not ok."""

    name: str
    ok: bool
    what: str
    remedy: str


def run_checks(host: Host, recipe: Recipe) -> list[CheckResult]:
    """The results of all checks that apply."""
    checks = CHECKS + (GPU_CHECKS if recipe.train.device == "cuda" else [])
    results = [result for check in checks if (result := check(host, recipe))]
    return results + check_disks(host, recipe)


def check_python(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.python is None:
        return None
    ok = host.python.startswith("3.11.")
    return CheckResult("Python", ok, host.python, "the lock is for Python 3.11: make .venv with it")


def check_tools(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.missing_tools is None:
        return None
    missing = ", ".join(host.missing_tools)
    note = " (DVC works without git)" if missing == "git" else ""
    what = f"missing: {missing}{note}" if missing else "present"
    return CheckResult("dvc, git", "dvc" not in host.missing_tools, what, f"put .venv/bin on PATH; {_install(recipe)}")


def check_libraries(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.libraries is None:
        return None
    differing = [
        f"{name} {host.libraries.get(name, 'is missing')} (lock: {version})"
        for name, version in sorted(host.locked.items())
        if host.libraries.get(name) != version
    ]
    what = f"all {len(host.locked)} as in requirements/{recipe.requirements}.txt"
    if differing:
        what = f"{len(differing)} of {len(host.locked)} differ: {', '.join(differing[:3])}"
    return CheckResult("libraries", not differing, what, _install(recipe))


def check_bitsandbytes(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.libraries is None or host.bitsandbytes is None:
        return None
    installed, locked = host.libraries.get("bitsandbytes", ""), host.locked.get("bitsandbytes")
    fault = ""
    if not installed:
        fault = "not installed"
    elif bitsandbytes_versions.is_broken(installed):
        fault = f"{installed}: the 8-bit optimizers of 0.36.0 to 0.41.0 are broken (model card)"
    elif installed != locked:
        fault = f"{installed}: the lock has {locked}, and another version rounds differently"
    elif host.bitsandbytes:
        fault = f"{installed}: {host.bitsandbytes}"
    remedy = f"{_install(recipe)}; on a GPU host look at the lines on driver and CUDA first"
    return CheckResult("bitsandbytes", not fault, fault or f"{installed}, native library loaded", remedy)


def check_numerics(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.numerics is None:
        return None
    what = host.numerics or f"the contract for {recipe.train.device} holds"
    return CheckResult("numerics", not host.numerics, what, "fix what the sentence names; the other lines say how")


def check_gpu_count(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.gpus is None:
        return None
    count, ranks, lanes = len(host.gpus), recipe.execution.ranks, recipe.schedule.lanes
    if lanes % ranks:
        what = f"execution.ranks is {ranks}, which does not divide {lanes} lanes"
        return CheckResult("GPUs", False, what, f"set execution.ranks in params.yaml to a divisor of {lanes}")
    names = ", ".join(sorted({gpu.name for gpu in host.gpus}))
    what = f"{f'{count} ({names})' if count else 'none is visible'}, for {ranks} ranks that share {lanes} lanes"
    remedy = "make the GPUs visible to this process (driver; `--gpus all` for a container)"
    if possible := max((number for number in range(1, count + 1) if lanes % number == 0), default=0):
        remedy = f"set execution.ranks in params.yaml to {possible}: it takes longer, the bits are the same"
    return CheckResult("GPUs", count >= ranks, what, remedy)


def check_same_gpu(host: Host, recipe: Recipe) -> CheckResult | None:
    if not host.gpus or host.gpus[0].multiprocessors is None:
        return None
    kinds = {f"{gpu.name}, architecture {gpu.architecture}, {gpu.multiprocessors} multiprocessors" for gpu in host.gpus}
    remedy = "equal bits need one kind: show only equal GPUs (CUDA_VISIBLE_DEVICES), and set execution.ranks to match"
    return CheckResult("same GPU", len(kinds) == 1, " / ".join(sorted(kinds)), remedy)


def check_architecture(host: Host, recipe: Recipe) -> CheckResult | None:
    if not host.gpus or not host.architectures or host.gpus[0].architecture is None:
        return None
    major, minor = map(int, host.gpus[0].architecture.split("."))
    ok = any(_has_kernels_for(architecture, major, minor) for architecture in host.architectures)
    what = f"sm_{major}{minor}; torch is built for {', '.join(host.architectures)}"
    remedy = "use a GPU of one of these architectures: the lock's torch has no code for this one"
    return CheckResult("architecture", ok, what, remedy)


def _has_kernels_for(built: str, major: int, minor: int) -> bool:
    """Whether code built for an architecture runs on another: machine code (sm_) on the same major, portable code
    (compute_) on any later one.
    """
    kind, _, number = built.partition("_")
    digits = "".join(character for character in number if character.isdigit())
    version = (int(digits[:-1]), int(digits[-1])) if len(digits) > 1 else (99, 0)
    return version <= (major, minor) and (kind == "compute" or version[0] == major)


def check_driver(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.driver is None:
        return None
    cuda = (_locked_version(host, "cuda-toolkit", "nvidia-cuda-runtime") or "13").split(".")[0]
    lowest = estimates.DRIVERS.get(int(cuda), max(estimates.DRIVERS.values()))
    major = host.driver.split(".")[0]
    remedy = f"install NVIDIA's driver {lowest} or later on the host: CUDA {cuda} needs it"
    if not host.driver:
        remedy += ". If nvidia-smi worked in this container before, create the container again"
    ok = major.isdigit() and int(major) >= lowest
    return CheckResult("driver", ok, host.driver or "none answers (nvidia-smi)", remedy)


def check_cuda(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.cuda is None:
        return None
    locked = ".".join((_locked_version(host, "cuda-toolkit", "nvidia-cuda-runtime") or "").split(".")[:2])
    what = f"{host.cuda or 'torch is a CPU build'} (lock: {locked})"
    return CheckResult("CUDA", host.cuda == locked, what, _install(recipe))


def check_nccl(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.nccl is None:
        return None
    locked = _locked_version(host, "nvidia-nccl") or ""
    remedy = "another NCCL hides the lock's: unset LD_LIBRARY_PATH and LD_PRELOAD"
    if not host.nccl:
        remedy = "it is visible only with the GPUs: fix their lines"
    return CheckResult("NCCL", host.nccl == locked, f"{host.nccl or 'none answers'} (lock: {locked})", remedy)


def check_gpu_memory(host: Host, recipe: Recipe) -> CheckResult | None:
    if not host.gpus or host.model is None:
        return None
    needed, smallest = estimates.gpu_memory(recipe, host.model), min(gpu.memory for gpu in host.gpus)
    planned = estimates.total(estimates.gpu_memory_parts(recipe, host.model))
    what = (
        f"{format_size(smallest)} per GPU, {format_size(planned)} planned for a step, {format_size(needed)} with spare"
    )
    remedy = "use larger GPUs, or more of them (lanes are shared)"
    if smallest > planned:
        remedy += "; the spare is an assumption, so less may do: try the train stage by hand"
    return CheckResult("GPU memory", smallest >= needed, what, remedy)


def check_memory(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.memory is None or host.model is None:
        return None
    needed = estimates.host_memory(recipe, host.model)
    what = f"{format_size(host.memory)}; {format_size(needed)} while {recipe.execution.ranks} ranks start"
    return CheckResult("memory", host.memory >= needed, what, "add swap for the start, or train with fewer ranks")


def check_shared_memory(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.shared_memory is None:
        return None
    needed = estimates.shared_memory(recipe)
    what = f"{format_size(host.shared_memory)} in /dev/shm, {format_size(needed)} needed"
    remedy = (
        f"give /dev/shm {format_size(needed)} (`--shm-size` or `--ipc=host` for a container, "
        "`mount -o remount,size=…` on a host), or lower execution.workers"
    )
    return CheckResult("shared memory", host.shared_memory >= needed, what, remedy)


def check_supplied_inputs(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.missing_inputs is None:
        return None
    missing = ", ".join(host.missing_inputs)
    remedy = (
        "put the file there (params.yaml says where to get it), "
        "or start from the published base: merge.start: published"
    )
    return CheckResult("supplied inputs", not missing, f"missing: {missing}" if missing else "present", remedy)


def check_database(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.database is None:
        return None
    remedy = "fix it (docs/recipe.md has the layout), or name another one: download.inputs.database in params.yaml"
    return CheckResult("database", not host.database, host.database or "laid out as danbooru2023.db", remedy)


def check_tars(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.tars is None:
        return None
    return CheckResult("tars", not host.tars, host.tars or "in one folder, each with a number", "correct the pins")


def check_network_weights(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.network_weights is None:
        return None
    what = " ".join(host.network_weights.split()) or "has the modules and shapes of this recipe, all values finite"
    return CheckResult("LoKr to start from", not host.network_weights, what, "name another file: download.inputs")


def check_disks(host: Host, recipe: Recipe) -> list[CheckResult]:
    """One result per file system: what is still to be written into its folders, against what is free."""
    if host.folders is None or host.model is None:
        return []
    built = estimates.build_sizes(recipe, host.model)
    needs = {
        "mirror": estimates.download_sizes(recipe, host.model),
        "build": built + estimates.temporary_sizes(recipe, host.model),
        "cache": built,
        "work": estimates.state_sizes(recipe, host.model),
    }
    by_device: dict[int, list[str]] = {}
    for name, folder in host.folders.items():
        by_device.setdefault(folder.device, []).append(name)
    results = []
    for names in by_device.values():
        to_come = {name: max(0, estimates.total(needs[name]) - host.folders[name].present) for name in names}
        needed, free = sum(to_come.values()), host.folders[names[0]].free
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in to_come.items() if size)
        unknown = [each.what for name in names if name != "cache" for each in needs[name] if each.bytes is None]
        what = f"{format_size(free)} free, {format_size(needed)} to come" + (f": {parts}" if parts else "")
        what += f"; not known: {', '.join(unknown)}" if unknown else ""
        remedy = (
            "free some space, or put the largest folder elsewhere: download.mirror and execution.work in params.yaml, "
            "`dvc cache dir`, or links"
        )
        ok = free >= needed * (1 + estimates.SPARE_DISK)
        results.append(CheckResult(f"disk of {', '.join(names)}", ok, what, remedy))
    return results


def _install(recipe: Recipe) -> str:
    lock = recipe.requirements
    return f"install the lock (requirements/{lock}.txt): `make environment LOCK={lock}`, or build the image again"


def _locked_version(host: Host, *prefixes: str) -> str | None:
    """The version of the first locked library with such a name: NVIDIA's names end with the CUDA version."""
    for prefix in prefixes:
        for name, version in host.locked.items():
            if name.startswith(prefix):
                return version
    return None


Check = Callable[[Host, Recipe], CheckResult | None]
CHECKS: list[Check] = [
    check_python,
    check_tools,
    check_libraries,
    check_bitsandbytes,
    check_numerics,
    check_memory,
    check_shared_memory,
    check_supplied_inputs,
    check_database,
    check_tars,
    check_network_weights,
]
GPU_CHECKS: list[Check] = [
    check_gpu_count,
    check_same_gpu,
    check_architecture,
    check_driver,
    check_cuda,
    check_nccl,
    check_gpu_memory,
]
