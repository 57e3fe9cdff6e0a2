"""Invariant: a line is green only if what it names was seen and is enough; a red line says what to do. What does not
concern the recipe has no line.

A described host (`--simulate`) has lines only for what its description says.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from kohaku_delta.params import Recipe
from kohaku_delta.preflight import size_estimates
from kohaku_delta.preflight.host_facts import Host
from kohaku_delta.preflight.parameter_counts import ParameterCounts

BROKEN = ((0, 36, 0), (0, 41, 0))  # bitsandbytes, model card: its 8-bit optimizers are wrong from … to
DRIVERS = {12: 525, 13: 580}  # CUDA major → least driver, NVIDIA's table of minor version compatibility
SPARE = 0.02  # of the disk, for what is not counted (logs, indices)


@dataclass(frozen=True)
class CheckResult:
    """One line of the table."""

    name: str
    good: bool
    says: str
    remedy: str = ""


def format_bytes(number: float) -> str:
    """Bytes as people read them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def all_checks(
    recipe: Recipe, host: Host, numbers: ParameterCounts | None, locked: dict[str, str]
) -> list[CheckResult]:
    """All lines. numbers: None leaves out what depends on the model's size."""
    lines: list[CheckResult | None] = [
        _python(host),
        _tools(host, recipe),
        _libraries(host, locked, recipe),
        _bitsandbytes(host, locked, recipe),
    ]
    lines += [_numerics(host, recipe)]
    if recipe.train.device == "cuda":
        lines += [
            _gpus(host, recipe),
            _same_gpus(host),
            _architecture(host),
            _driver(host, locked),
            _cuda(host, locked, recipe),
            _nccl(host, locked),
        ]
        lines += [_gpu_memory(host, recipe, numbers)] if numbers else []
    if numbers:
        lines += [_memory(host, recipe, numbers)]
    lines += [_shared_memory(host, recipe), _supplied(host), _database(host)]
    if numbers and host.places is not None:
        lines += list(_disks(host, recipe, numbers))
    return [line for line in lines if line is not None]


def _install(recipe: Recipe) -> str:
    return f"install the lock (requirements/{recipe.requirements}.txt): `make environment LOCK={recipe.requirements}`, or build the image anew"


def _python(host: Host) -> CheckResult | None:
    if host.python is None:
        return None
    return CheckResult(
        "Python", host.python.startswith("3.11."), host.python, "the lock is for 3.11: make .venv with that one"
    )


def _tools(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.missing_tools is None:
        return None
    missing = ", ".join(host.missing_tools)
    says = f"not there: {missing}" + (" (DVC does without git)" if missing == "git" else "") if missing else "there"
    return CheckResult("dvc, git", "dvc" not in host.missing_tools, says, f"put .venv/bin on PATH; {_install(recipe)}")


def _libraries(host: Host, locked: dict[str, str], recipe: Recipe) -> CheckResult | None:
    if host.libraries is None:
        return None
    found = {name: host.libraries.get(name, "is missing") for name in sorted(locked)}
    others = [f"{name} {number} (lock: {locked[name]})" for name, number in found.items() if number != locked[name]]
    good = f"all {len(locked)} as in requirements/{recipe.requirements}.txt"
    return CheckResult(
        "libraries",
        not others,
        f"{len(others)} of {len(locked)} differ: {', '.join(others[:3])}" if others else good,
        _install(recipe),
    )


def _bitsandbytes(host: Host, locked: dict[str, str], recipe: Recipe) -> CheckResult | None:
    if host.libraries is None or host.bitsandbytes is None:
        return None
    installed = host.libraries.get("bitsandbytes", "")
    number = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if not installed:
        says = "it is not installed"
    elif BROKEN[0] <= number <= BROKEN[1]:
        says = f"{installed}: the 8-bit optimizers of 0.36.0 to 0.41.0 are broken (model card)"
    elif installed != locked.get("bitsandbytes"):
        says = f"{installed}: the lock says {locked.get('bitsandbytes')}, and another version rounds otherwise"
    elif host.bitsandbytes:
        says = f"{installed}: {host.bitsandbytes}"
    else:
        return CheckResult("bitsandbytes", True, f"{installed}, native library loaded")
    return CheckResult(
        "bitsandbytes", False, says, f"{_install(recipe)}; on a GPU host look at the lines on driver and CUDA first"
    )


def _numerics(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.numerics is None:
        return None
    says = host.numerics or f"the contract for {recipe.train.device} holds"
    return CheckResult("numerics", not host.numerics, says, "mend what the sentence names; the other lines say how")


def _gpus(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.cards is None:
        return None
    count, ranks, lanes = len(host.cards), recipe.execution.ranks, recipe.schedule.lanes
    if lanes % ranks:
        return CheckResult(
            "GPUs",
            False,
            f"execution.ranks is {ranks}, which does not divide {lanes} lanes",
            f"set execution.ranks in params.yaml to a divisor of {lanes}",
        )
    names = ", ".join(sorted({card.name for card in host.cards}))
    says = f"{count} ({names})" if count else "none is seen"
    possible = max((each for each in range(1, count + 1) if lanes % each == 0), default=0)
    remedy = "show the GPUs to this process (driver; `--gpus all` for a container)"
    if possible:
        remedy = f"set execution.ranks in params.yaml to {possible}: it takes longer, the bits are the same"
    return CheckResult("GPUs", count >= ranks, f"{says}, for {ranks} ranks that share {lanes} lanes", remedy)


def _same_gpus(host: Host) -> CheckResult | None:
    if not host.cards or host.cards[0].multiprocessors is None:
        return None
    kinds = sorted(
        {
            f"{card.name}, architecture {card.architecture}, {card.multiprocessors} multiprocessors"
            for card in host.cards
        }
    )
    remedy = (
        "equal bits need one kind: show only equal ones (CUDA_VISIBLE_DEVICES), and set execution.ranks to their number"
    )
    return CheckResult("same GPU", len(kinds) == 1, " / ".join(kinds), remedy)


def _architecture(host: Host) -> CheckResult | None:
    if not host.cards or not host.architectures or host.cards[0].architecture is None:
        return None
    major, minor = map(int, host.cards[0].architecture.split("."))
    fitting = [each for each in host.architectures if _has_kernels_for(each, major, minor)]
    says = f"sm_{major}{minor}; torch is built for {', '.join(host.architectures)}"
    return CheckResult(
        "architecture",
        bool(fitting),
        says,
        "take a GPU of one of these architectures: the lock's torch has no code for this one",
    )


def _has_kernels_for(built: str, major: int, minor: int) -> bool:
    """Whether code built for an architecture runs on another: machine code (sm_) on the same major, portable code
    (compute_) on any later one.
    """
    kind, _, number = built.partition("_")
    number = "".join(each for each in number if each.isdigit())
    theirs = (int(number[:-1]), int(number[-1])) if len(number) > 1 else (99, 0)
    return theirs <= (major, minor) and (kind == "compute" or theirs[0] == major)


def _driver(host: Host, locked: dict[str, str]) -> CheckResult | None:
    if host.driver is None:
        return None
    cuda = (_locked_version(locked, "cuda-toolkit", "nvidia-cuda-runtime") or "13").split(".")[0]
    least = DRIVERS.get(int(cuda), max(DRIVERS.values()))
    found = host.driver.split(".")[0]
    says = host.driver or "none answers (nvidia-smi)"
    return CheckResult(
        "driver",
        found.isdigit() and int(found) >= least,
        says,
        f"install NVIDIA's driver {least} or later on the host: CUDA {cuda} needs it",
    )


def _cuda(host: Host, locked: dict[str, str], recipe: Recipe) -> CheckResult | None:
    if host.cuda is None:
        return None
    wanted = ".".join((_locked_version(locked, "cuda-toolkit", "nvidia-cuda-runtime") or "").split(".")[:2])
    return CheckResult(
        "CUDA", host.cuda == wanted, f"{host.cuda or 'torch is a CPU build'} (lock: {wanted})", _install(recipe)
    )


def _nccl(host: Host, locked: dict[str, str]) -> CheckResult | None:
    if host.nccl is None:
        return None
    wanted = _locked_version(locked, "nvidia-nccl") or ""
    remedy = (
        "another NCCL comes before the lock's: unset LD_LIBRARY_PATH and LD_PRELOAD"
        if host.nccl
        else "it is seen with the GPUs: mend their lines"
    )
    return CheckResult("NCCL", host.nccl == wanted, f"{host.nccl or 'none answers'} (lock: {wanted})", remedy)


def _gpu_memory(host: Host, recipe: Recipe, numbers: ParameterCounts) -> CheckResult | None:
    if not host.cards:
        return None
    least, lowest = (
        size_estimates.gpu_memory(recipe, numbers, recipe.execution.ranks),
        min(card.memory for card in host.cards),
    )
    always = size_estimates.total(size_estimates.gpu_memory_parts(recipe, numbers, recipe.execution.ranks))
    says = f"{format_bytes(lowest)} a GPU; {format_bytes(least)} is taken for enough (the release's cards), {format_bytes(always)} of it is always full"
    remedy = "take larger GPUs"
    if lowest > always:
        remedy += "; how much activations need was not measured, so less may do: try the train stage by hand"
    return CheckResult("GPU memory", lowest >= least, says, remedy)


def _memory(host: Host, recipe: Recipe, numbers: ParameterCounts) -> CheckResult | None:
    if host.memory is None:
        return None
    least = size_estimates.host_memory(recipe, numbers, recipe.execution.ranks)
    says = f"{format_bytes(host.memory)}, {format_bytes(least)} while {recipe.execution.ranks} ranks begin"
    return CheckResult("memory", host.memory >= least, says, "add swap for the beginning, or train with fewer ranks")


def _shared_memory(host: Host, recipe: Recipe) -> CheckResult | None:
    if host.shared_memory is None:
        return None
    least = size_estimates.shared_memory(recipe, recipe.execution.ranks)
    remedy = f"give /dev/shm {format_bytes(least)} (`--shm-size` or `--ipc=host` for a container, `mount -o remount,size=…` on a host), or lower execution.workers"
    return CheckResult(
        "shared memory",
        host.shared_memory >= least,
        f"{format_bytes(host.shared_memory)} in /dev/shm, {format_bytes(least)} needed",
        remedy,
    )


def _supplied(host: Host) -> CheckResult | None:
    if host.supplied is None:
        return None
    missing = ", ".join(host.supplied)
    remedy = "put the file there (params.yaml says where it comes from), or start from the published base: merge.start: published"
    return CheckResult("supplied inputs", not missing, f"not there: {missing}" if missing else "there", remedy)


def _database(host: Host) -> CheckResult | None:
    if host.database is None:
        return None
    remedy = "mend it (docs/recipe.md has the layout), or name the one that was meant: download.inputs.database in params.yaml"
    return CheckResult("database", not host.database, host.database or "laid out as danbooru2023.db", remedy)


def _disks(host: Host, recipe: Recipe, numbers: ParameterCounts) -> Iterator[CheckResult]:
    """A line a file system: what is still to come into its folders, against what is free."""
    written = size_estimates.build_sizes(recipe, numbers)
    needs = {
        "mirror": size_estimates.download_sizes(recipe, numbers),
        "build": written,
        "cache": written,
        "work": size_estimates.state_sizes(recipe, numbers),
    }
    folders = {name: size_estimates.total(each) for name, each in needs.items()}
    open_ends = {
        name: [one.what for one in each if one.bytes is None] if name != "cache" else [] for name, each in needs.items()
    }
    shared: dict[int, list[str]] = defaultdict(list)
    for name, place in host.places.items():
        shared[place.device].append(name)
    for names in shared.values():
        left = {name: max(0, folders[name] - host.places[name].there) for name in names}
        least, free = sum(left.values()), host.places[names[0]].free
        parts = ", ".join(f"{name} {format_bytes(left[name])}" for name in names if left[name])
        says = f"{format_bytes(free)} free, {format_bytes(least)} to come" + (f": {parts}" if parts else "")
        unknown = [name for place in names for name in open_ends[place]]
        says += f"; not known: {', '.join(unknown)}" if unknown else ""
        remedy = "free some, or put the largest folder elsewhere: download.mirror and execution.work in params.yaml, `dvc cache dir`, or links"
        yield CheckResult(f"disk of {', '.join(names)}", free >= least * (1 + SPARE), says, remedy)


def _locked_version(locked: dict[str, str], *beginnings: str) -> str | None:
    """The version of the first locked library whose name begins so: NVIDIA's carry the CUDA version in theirs."""
    return next(
        (number for beginning in beginnings for name, number in locked.items() if name.startswith(beginning)), None
    )
