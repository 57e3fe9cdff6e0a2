"""Invariant: no number without its source: counted, pinned, computed, or measured by somebody who is named; what nobody
measured is said to be so.

A host is described in words: "2x RTX 3090", or "4x RTX 4090, 24 GB, memory 128 GB, disk 4 TB" (the first size is each
GPU's memory).
"""

import re
from dataclasses import dataclass

from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.preflight import size_estimates
from kohaku_delta.preflight.host_checks import format_bytes
from kohaku_delta.preflight.host_facts import DiskFolder, Gpu, Host
from kohaku_delta.preflight.parameter_counts import ParameterCounts, checkpoints
from kohaku_delta.preflight.size_estimates import GB, SizeEstimate

# each GPU's memory in GB, architecture and multiprocessors, from the makers' data sheets
CARDS = {
    "RTX 3090": (24, "8.6", 82),
    "RTX 3090 Ti": (24, "8.6", 84),
    "RTX 4090": (24, "8.9", 128),
    "A100 80GB": (80, "8.0", 108),
    "H100": (80, "9.0", 132),
}
UNITS = {"GB": GB, "TB": 1000 * GB}


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan."""

    what: str
    figure: str
    source: str = ""


def parse_host(text: str) -> Host:
    """The host of a description; what it does not say is not known."""
    first, *rest = [part.strip() for part in text.split(",")]
    match = re.fullmatch(r"(\d+)\s*[x×]\s*(.+)", first)
    if not match or not int(match[1]):
        raise UserError(
            f'--simulate: {first!r} says nothing known. An example: "2x RTX 3090, 24 GB, memory 64 GB, disk 2 TB".'
        )
    count, name = int(match[1]), match[2].strip()
    sizes = {}
    for part in rest:
        said = re.fullmatch(r"(?:(memory|disk)\s+)?(\d+(?:\.\d+)?)\s*(GB|TB)", part)
        if not said:
            raise UserError(
                f'--simulate: {part!r} says nothing known. An example: "2x RTX 3090, 24 GB, memory 64 GB, disk 2 TB".'
            )
        sizes[said[1] or "card"] = int(float(said[2]) * UNITS[said[3]])
    known = CARDS.get(name)
    if not known and "card" not in sizes:
        raise UserError(
            f'--simulate: the memory of {name} is not known here. Say it: "{first}, 24 GB". Known: {", ".join(CARDS)}.'
        )
    card = Gpu(name, sizes.get("card", known[0] * GB if known else 0), *(known[1:] if known else ()))
    places = (
        {place: DiskFolder(place, 0, sizes["disk"], 0) for place in ("mirror", "build", "cache", "work")}
        if "disk" in sizes
        else None
    )
    return Host(cards=(card,) * count, memory=sizes.get("memory"), places=places)


def plan_rows(recipe: Recipe, numbers: ParameterCounts | None, host: Host, seconds: float | None) -> list[PlanRow]:
    """The plan of the whole recipe on a described host. numbers: None if the model's size is not known, and nothing is
    planned from it. seconds: a step's, measured on such a host; None: the release's, where it is the release's host.
    """
    if numbers is None:
        fetched = size_estimates.download_sizes(recipe, None)
        plan = [
            PlanRow("size of the model", "not known", unknown_sizes(recipe)),
            PlanRow("fetch into the mirror", _sum(fetched), f"{len(fetched)} inputs"),
            *_each(fetched),
        ]
        return [
            *plan,
            PlanRow("build, work, memory", "not known", "they follow from the size of the model"),
            *_time(recipe, host, seconds),
        ]
    ranks = recipe.execution.ranks
    fetched, written, worked = (
        size_estimates.download_sizes(recipe, numbers),
        size_estimates.build_sizes(recipe, numbers),
        size_estimates.state_sizes(recipe, numbers),
    )
    both = [
        *written,
        SizeEstimate(
            "a second copy in DVC's cache",
            size_estimates.total(written),
            "unless the file system shares blocks (reflink)",
        ),
    ]
    plan = [PlanRow("fetch into the mirror", _sum(fetched), f"{len(fetched)} inputs"), *_each(fetched)]
    plan += [PlanRow("build and cache", _sum(both), "what the stages write"), *_each(both)]
    plan += [
        PlanRow("work", format_bytes(size_estimates.total(worked)), "training state at its fullest"),
        *_each(worked),
    ]
    plan += [PlanRow("disk in all", _sum([*fetched, *both, *worked]), "sum of the three")]
    plan += _time(recipe, host, seconds)
    if recipe.train.device == "cuda":
        always = size_estimates.gpu_memory_parts(recipe, numbers, ranks)
        above = f"each of {ranks} GPUs; activations come on top, not measured for this code"
        plan += [PlanRow("GPU memory, always full", format_bytes(size_estimates.total(always)), above), *_each(always)]
    plan += [
        PlanRow(
            "main memory",
            format_bytes(size_estimates.host_memory(recipe, numbers, ranks)),
            f"computed: base, LoKr and tables, once a rank, {ranks} ranks",
        )
    ]
    loaders = f"computed: {ranks} × {recipe.execution.workers} loader processes × {size_estimates.AHEAD} micro-batches"
    nccl = "; 1 GB for NCCL (its documentation)" if recipe.train.device == "cuda" else ""
    return [*plan, PlanRow("shared memory", format_bytes(size_estimates.shared_memory(recipe, ranks)), loaders + nccl)]


def _each(needs: list[SizeEstimate]) -> list[PlanRow]:
    return [
        PlanRow(f"  {each.what}", "not known" if each.bytes is None else format_bytes(each.bytes), each.source)
        for each in needs
    ]


def _sum(needs: list[SizeEstimate]) -> str:
    return format_bytes(size_estimates.total(needs)) + (
        " and more" if any(each.bytes is None for each in needs) else ""
    )


def unknown_sizes(recipe: Recipe) -> str:
    """Why the size of the model is not known, and what to do."""
    names = ", ".join(f"download.inputs.{name}" for name in checkpoints(recipe)) or "no base in download.inputs"
    return f"no checkpoint is at hand, and none is pinned with the size of SDXL 1.0 ({names}): it is known after the download"


def _time(recipe: Recipe, host: Host, seconds: float | None) -> list[PlanRow]:
    count, release = size_estimates.steps(recipe), size_estimates.RELEASE
    if count is None:
        return [PlanRow("steps", "not known", "the schedule stage tells")]
    kept = size_estimates.milestones(recipe)
    plan = [PlanRow("steps", f"{count:,}", "the model card; the schedule stage tells again")]
    if kept:
        plan += [
            PlanRow(
                "states kept for good", f"{len(kept)}", f"steps {kept[0]:,} to {kept[-1]:,}, each with its LoKr file"
            )
        ]
    used = f"{recipe.execution.ranks} of {len(host.cards)} GPUs"
    if (
        seconds is None
        and (recipe.execution.ranks, host.cards[0].name) == (release["gpus"], release["gpu"])
        and recipe.published
    ):
        seconds, source = release["seconds"], release["who"]
    elif seconds is None:
        return [
            *plan,
            PlanRow(
                "time a step",
                "not measured",
                f"on {used} of this kind: measure some steps (work/*/log.csv has them) and say --seconds-per-step",
            ),
        ]
    else:
        source = "--seconds-per-step"
    lost = recipe.execution.save_every * seconds / 3600
    product = "steps × time a step" + (
        "; this code's own speed on that card was not measured" if source == release["who"] else ""
    )
    return [
        *plan,
        PlanRow("time a step", f"{seconds:g} s", f"{source}; {used}"),
        PlanRow("training", f"{size_estimates.days(count, seconds):.1f} days", product),
        PlanRow(
            "a power cut costs",
            f"up to {lost:.1f} h",
            f"a state every {recipe.execution.save_every} steps; a stop (SIGTERM) costs none",
        ),
    ]
