"""The plan of a build for a host that is only described. Every figure has its source; what nobody measured says so.

A description: "2x RTX 3090", or "4x RTX 4090, 24 GB, memory 128 GB, disk 4 TB" (the first size is each GPU's memory).
"""

import re
from dataclasses import dataclass

from kohaku_delta.errors import UserError
from kohaku_delta.params import Recipe
from kohaku_delta.preflight import estimates
from kohaku_delta.preflight.estimates import GB, KNOWN_GPUS, SizeEstimate
from kohaku_delta.preflight.host_facts import DiskFolder, Gpu, Host
from kohaku_delta.preflight.parameter_counts import ParameterCounts, architecture_pins
from kohaku_delta.units import format_duration, format_size

MAX_GPUS = 1024
UNITS = {"GB": GB, "TB": 1000 * GB}
EXAMPLE = 'An example: "2x RTX 3090, 24 GB, memory 64 GB, disk 2 TB".'


@dataclass(frozen=True)
class PlanRow:
    what: str
    figure: str
    source: str = ""


def parse_host(text: str, locked: dict[str, str], model: ParameterCounts | None) -> Host:
    """The host of a description; what it does not mention is not known."""
    gpus, *rest = [part.strip() for part in text.split(",")]
    match = re.fullmatch(r"(\d{1,9})\s*[x×]\s*(.+)", gpus)
    if not match or not 0 < int(match[1]) <= MAX_GPUS:
        raise UserError(f"--simulate: {gpus!r} is not a number of GPUs. {EXAMPLE}")
    name = match[2].strip()
    sizes: dict[str, int] = {}
    for part in rest:
        size = re.fullmatch(r"(?:(memory|disk)\s+)?(\d+(?:\.\d+)?)\s*(GB|TB)", part)
        if not size:
            raise UserError(f"--simulate: {part!r} is not a size. {EXAMPLE}")
        if (size[1] or "gpu") in sizes:
            raise UserError(f"--simulate: {part!r} is a second size of the same thing. {EXAMPLE}")
        sizes[size[1] or "gpu"] = int(float(size[2]) * UNITS[size[3]])
    if name not in KNOWN_GPUS and "gpu" not in sizes:
        known = ", ".join(KNOWN_GPUS)
        raise UserError(f'--simulate: the memory of {name} is not known. Add it: "{gpus}, 24 GB". Known: {known}.')
    memory, *details = KNOWN_GPUS.get(name, (0, None, None))
    folders = None
    if "disk" in sizes:
        folders = {name: DiskFolder(name, 0, sizes["disk"], 0) for name in ("mirror", "build", "cache", "work")}
    gpu = Gpu(name, sizes.get("gpu", memory * GB), *details)
    return Host(locked, model, gpus=(gpu,) * int(match[1]), memory=sizes.get("memory"), folders=folders)


def not_described(host: Host) -> list[str]:
    """What a description did not mention."""
    return [name for name, value in (("memory", host.memory), ("disk", host.folders)) if value is None]


def plan_rows(recipe: Recipe, host: Host, seconds: float | None) -> list[PlanRow]:
    """The plan of the whole recipe.

    seconds: per step, measured on such a host; None: the release's, if the host has its GPUs.
    """
    model, ranks = host.model, recipe.execution.ranks
    downloads = estimates.download_sizes(recipe, model)
    rows = _rows("download into the mirror", downloads, f"{len(downloads)} inputs")
    if model is None:
        unknown = "they follow from the size of the model"
        return [
            PlanRow("size of the model", "not known", unknown_size(recipe)),
            *rows,
            PlanRow("build, work, memory", "not known", unknown),
            *_decoding_rows(recipe),
            *_time_rows(recipe, host.gpus or (), seconds),
        ]
    built = estimates.build_sizes(recipe, model)
    copy = "unless the file system shares blocks (reflink)"
    built.append(SizeEstimate("a second copy in DVC's cache", estimates.total(built), copy))
    built += estimates.temporary_sizes(recipe, model)
    states = estimates.state_sizes(recipe, model)
    rows += _rows("build and cache", built, "what the stages write")
    rows += _rows("work", states, "training states at their largest")
    rows += [PlanRow("disk in all", _sum([*downloads, *built, *states]), "sum of the three")]
    rows += _decoding_rows(recipe)
    rows += _time_rows(recipe, host.gpus or (), seconds)
    cuda = recipe.train.device == "cuda"
    if cuda:
        spare = format_size(estimates.GPU_SPARE)
        source = f"each of {ranks} GPUs at a step's peak; not measured on a card. {spare} of spare are asked for"
        rows += _rows("GPU memory", estimates.gpu_memory_parts(recipe, model), source)
    loaders = f"{ranks} × {recipe.execution.workers} loader processes × {estimates.MICRO_BATCHES_AHEAD} micro-batches"
    return [
        *rows,
        PlanRow(
            "main memory",
            format_size(estimates.host_memory(recipe, model)),
            f"while {ranks} ranks start: base, LoKr in float32 and tables of each, computed",
        ),
        PlanRow(
            "shared memory",
            format_size(estimates.shared_memory(recipe)),
            f"computed: {loaders}" + ("; 1 GB for NCCL (its documentation)" if cuda else ""),
        ),
    ]


def unknown_size(recipe: Recipe) -> str:
    """Why the size of the model is not known."""
    names = ", ".join(f"download.inputs.{name}" for name in architecture_pins(recipe)) or "no base in download.inputs"
    return f"no checkpoint is here, and none is pinned with the size of SDXL 1.0 ({names}): known after the download"


def _rows(what: str, parts: list[SizeEstimate], source: str) -> list[PlanRow]:
    """The sum of the parts, then each part."""
    figures = ["not known" if part.bytes is None else format_size(part.bytes) for part in parts]
    rows = [PlanRow(f"  {part.what}", figure, part.source) for part, figure in zip(parts, figures, strict=True)]
    return [PlanRow(what, _sum(parts), source), *rows]


def _sum(parts: list[SizeEstimate]) -> str:
    more = " and more" if any(part.bytes is None for part in parts) else ""
    return format_size(estimates.total(parts)) + more


def _decoding_rows(recipe: Recipe) -> list[PlanRow]:
    """What filter.image_check: decode costs."""
    if recipe.filter.image_check != "decode":
        return []
    count, hours = estimates.posts(recipe), estimates.decoding_hours(recipe)
    rate = f"{estimates.DECODED_PER_SECOND} images/s per core, {estimates.DECODED_SOURCE}"
    if count is None or hours is None:
        return [PlanRow("decoding all images", "not known", f"the select stage counts the posts; {rate}")]
    times = ", ".join(f"{hours / cores:.1f} h on {cores} cores" for cores in (2, 16, 32))
    return [PlanRow("decoding all images", f"{hours:.0f} core hours", f"{count:,} at {rate}: {times}")]


def _training_time(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 86400 else format_duration(seconds)


def _time_rows(recipe: Recipe, gpus: tuple[Gpu, ...], seconds: float | None) -> list[PlanRow]:
    steps, ranks, save_every = estimates.steps(recipe), recipe.execution.ranks, recipe.execution.save_every
    if steps is None:
        return [PlanRow("steps", "not known", "the schedule stage counts them")]
    source = "published; the schedule stage counts them again"
    if possible := estimates.steps_of_published_posts(recipe):
        source = f"published; {possible[0]:,} to {possible[1]:,} follow from its number of posts; {source[11:]}"
    rows = [PlanRow("steps", f"{steps:,}", "schedule.max_steps" if steps == recipe.schedule.max_steps else source)]
    if kept := estimates.milestones(recipe):
        source = f"steps {kept[0]:,} to {kept[-1]:,}, each with its LoKr file"
        rows.append(PlanRow("states never deleted", f"{len(kept)}", source))
        source = f"the stage milestones draws and measures with {len(kept) + 2} models, the preview with 2"
        rows.append(PlanRow("time of the measurements", "not measured", source))
    used = f"{ranks} of {len(gpus)} GPUs"
    source, note = "--seconds-per-step", ""
    known = recipe.published.training if recipe.published else None
    if seconds is None:
        if not known or (ranks, gpus[0].name) != (known.gpus, known.gpu):
            remedy = "measure some steps (work/*/log.csv has them) and give --seconds-per-step"
            return [*rows, PlanRow("time per step", "not measured", f"on {used} of this kind: {remedy}")]
        seconds, source = known.seconds_per_step, f"the release: {known.said}"
        note = "; this code's own speed on that GPU was not measured"
    return [
        *rows,
        PlanRow("time per step", f"{seconds:g} s", f"{source}; {used}"),
        PlanRow("training", _training_time(steps * seconds), f"steps × time per step{note}"),
        PlanRow(
            "a power cut costs",
            f"up to {min(save_every, recipe.train.milestone_every, steps) * seconds / 3600:.1f} h",
            f"a state every {save_every} steps; a stop (SIGTERM) costs none",
        ),
    ]
