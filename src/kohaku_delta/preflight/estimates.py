"""Sizes and times of a build. Every figure is computed from the recipe, counted on the model, or named with its source.

Bytes are decimal (1 GB = 10^9). Where a size is known only as a range, the larger end counts.
"""

from dataclasses import dataclass

from kohaku_delta.hub import pins
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.preflight.parameter_counts import ParameterCounts, architecture_pins
from kohaku_delta.training import buckets

GB = 10**9
WEBP_SET = "danbooru2023-webp-4Mpixel"  # the release's tars, whose sizes are not pinned
TARS = 1600 * GB, "about 1.3–1.6 TB: what users of the webp set report; no size is pinned"
MAIN_TARS, TAR_SOURCE = 1000, "at most 1.6 GB each: the webp set has up to 1.6 TB, in 1,000 main tars and smaller ones"
INDEX_BYTES, INDEX_SOURCE = 10**6, "the public index has about 0.9 MB per tar"
ORIGINALS = "/nyanko7/danbooru2023"
ORIGINAL_TARS = 8000 * GB, "about 8 TB, as its page says; no size is pinned"
CONVERTED, CONVERTED_SOURCE = 0.31, "0.3 of posts.json: measured on made-up posts"
# GPU memory in GB, architecture, multiprocessors: the makers' data sheets.
KNOWN_GPUS = {
    "RTX 3090": (24, "8.6", 82),
    "RTX 3090 Ti": (24, "8.6", 84),
    "RTX 4090": (24, "8.9", 128),
    "A100 80GB": (80, "8.0", 108),
    "H100": (80, "9.0", 132),
}
DRIVERS = {12: 525, 13: 580}  # CUDA major → lowest driver: NVIDIA's table of minor version compatibility
POST_BYTES = 700  # per post in posts and captions: 35 tags (0.25 billion tags of 7 million posts) of 20 bytes each
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MICRO_BATCHES_AHEAD = 5  # per loader process: those of training/batch_builder.py and the one in use
NCCL_SHARED = GB  # NVIDIA's NCCL documentation asks for --shm-size=1g in a container
# Bytes per pixel of a micro-batch, with checkpoints: a full-size step on torch's fake tensors (make bench-train) has at
# its peak 4.07 GB more than weights, sums and gradient, with any number of ranks, for 4 images of 1024 × 1024.
ACTIVATIONS, ACTIVATIONS_SOURCE = 970, "970 bytes per pixel and image, planned with fake tensors (docs/performance.md)"
# What no tensor shows: CUDA's context, the kernels' workspaces, NCCL, fragmentation. An assumption, not measured.
GPU_SPARE = 4 * GB
CPU_STEP = 1.35  # times its tensors: a resumed step at full size took 16.1 GB for 12.1 (docs/rehearsal.md)
PROCESS = GB // 2  # a rank without its model: 0.43 GB measured (Python, torch, diffusers, transformers)
DECODED_PER_SECOND = 21  # images per core
DECODED_SOURCE = "measured for 2048 × 1536 (docs/performance.md)"
SPARE_DISK = 0.02  # share of the disk for what is not counted (logs, indices): an assumption


@dataclass(frozen=True)
class SizeEstimate:
    """Bytes of `what`, and how they are known; None: unknown before the download."""

    what: str
    bytes: int | None
    source: str


def total(estimates: list[SizeEstimate]) -> int:
    """The sum of the known sizes."""
    return sum(each.bytes or 0 for each in estimates)


def needed_pins(recipe: Recipe) -> list[tuple[str, Pin]]:
    """(name, pin) of the inputs that the recipe reads. A pin with a span in its url stands for many files."""
    unread = pins.unread_inputs(recipe)
    return [(name, pin) for name, pin in recipe.download.all_pins if name not in unread]


def steps(recipe: Recipe) -> int | None:
    """Steps of the whole training; None if only the schedule stage will know."""
    known = recipe.published.dataset.steps if recipe.published else None
    return min(recipe.schedule.max_steps or known, known) if known else recipe.schedule.max_steps


def steps_of_published_posts(recipe: Recipe) -> tuple[int, int] | None:
    """Fewest and most steps that the published number of posts can take: up to batch_size - 1 places of each bucket's
    last micro-batch are empty. None if no number was published.
    """
    if not recipe.published:
        return None
    schedule, count = recipe.schedule, recipe.published.dataset.posts
    empty = len(buckets.all_buckets(schedule)) * (schedule.batch_size - 1)
    full, ragged = (-(-places // schedule.batch_size) for places in (count, count + empty))
    fewest, most = (schedule.epochs * -(-batches // schedule.micro_batches) for batches in (full, ragged))
    return fewest, most


def posts(recipe: Recipe) -> int | None:
    """At most so many posts are trained on; None if a range takes all of a database that nobody counted."""
    if recipe.published:
        return recipe.published.dataset.posts
    total_draws = 0
    for each in recipe.selection.ranges:
        if each.draw == "all":
            return None
        total_draws += each.draw
    return total_draws


def decoding_hours(recipe: Recipe) -> float | None:
    """Hours of one core for all images that are trained on; None if their number is not known."""
    count = posts(recipe)
    return None if count is None else count / DECODED_PER_SECOND / 3600


def checkpoint_bytes(recipe: Recipe, model: ParameterCounts) -> int:
    """A whole model as merge and bake write it."""
    return ITEM_BYTES[recipe.merge.output_dtype] * (model.unet + model.text + model.vae)


def lokr_bytes(model: ParameterCounts) -> int:
    """The tensors of a LoKr file, which is always fp16."""
    return 2 * model.lokr


def state_bytes(recipe: Recipe, model: ParameterCounts) -> int:
    """A saved state without its journal: weights and 8-bit optimizer state."""
    return ITEM_BYTES[recipe.train.weights] * model.lokr + model.optimizer


def journal_row_bytes(recipe: Recipe, model: ParameterCounts) -> int:
    """One step in the journal: a loss per micro-batch, a fingerprint per lane, a byte per tensor, two sha256 as text,
    nine numbers.
    """
    return 4 * recipe.schedule.micro_batches + 8 * recipe.schedule.lanes + model.entries + 2 * 64 + 9 * 8


def milestones(recipe: Recipe) -> list[int]:
    """The steps whose states and LoKr files are never deleted."""
    every = recipe.train.milestone_every
    return list(range(every, (steps(recipe) or 0) + 1, every))


def download_sizes(recipe: Recipe, model: ParameterCounts | None) -> list[SizeEstimate]:
    """What is downloaded into the mirror. model: None if its size is not known."""
    pins_by_name: dict[str, list[Pin]] = {}
    for name, pin in needed_pins(recipe):
        if not pin.local_path:
            pins_by_name.setdefault(name, []).append(pin)
    estimates = []
    for name, own in pins_by_name.items():
        files, sizes = sum(map(pins.span_files, own)), [pin.bytes for pin in own]
        if None not in sizes:
            estimate = SizeEstimate(name, sum(size or 0 for size in sizes), "pinned")
        elif name == "tars" and all(WEBP_SET in pin.url for pin in own):
            most = files * TARS[0] // MAIN_TARS
            size, source = TARS if most > TARS[0] else (most, TAR_SOURCE)
            estimate = SizeEstimate(f"{files:,} tars", size, source)
        elif name == "tars" and files >= 2000 and all(ORIGINALS in pin.url for pin in own):
            estimate = SizeEstimate(f"{files:,} tars", *ORIGINAL_TARS)
        elif name == "index" and all(WEBP_SET in pin.url for pin in own):
            estimate = SizeEstimate(f"{files:,} lists", files * INDEX_BYTES, INDEX_SOURCE)
        elif name in architecture_pins(recipe) and model:
            estimate = SizeEstimate(name, checkpoint_bytes(recipe, model), f"no size is pinned: that of {model.of}")
        else:
            estimate = SizeEstimate(name, None, "no size is pinned: `kohaku-delta pin` gets it from the Hub")
        estimates.append(estimate)
    posts = recipe.download.inputs.get("posts")
    if isinstance(posts, Pin):
        database = None if posts.bytes is None else int(CONVERTED * posts.bytes)
        estimates.append(SizeEstimate("database made of posts", database, CONVERTED_SOURCE))
    return estimates


def milestone_lokrs(recipe: Recipe, model: ParameterCounts) -> SizeEstimate:
    """The milestones' LoKr files: in work/, in build/milestones, and in DVC's cache."""
    count, size = len(milestones(recipe)), lokr_bytes(model)
    if steps(recipe) is None:
        return SizeEstimate("milestones' LoKr files", None, "the schedule stage counts the steps")
    return SizeEstimate(f"{count} milestones' LoKr files", count * size, f"{size / 1e6:.0f} MB each: fp16, counted")


def temporary_sizes(recipe: Recipe, model: ParameterCounts) -> list[SizeEstimate]:
    """What lies in build/ for a while and never in DVC's cache."""
    size = checkpoint_bytes(recipe, model)
    return [SizeEstimate("a milestone's model", size, "the stage milestones bakes one at a time, and deletes it")]


def build_sizes(recipe: Recipe, model: ParameterCounts) -> list[SizeEstimate]:
    """What the stages write. DVC keeps a second copy in its cache, unless the file system can share blocks."""
    size, count = checkpoint_bytes(recipe, model), posts(recipe)
    parameters = model.unet + model.text + model.vae
    journal = journal_row_bytes(recipe, model) * (steps(recipe) or 0)
    posts_source = f"{POST_BYTES} bytes per post at most (an estimate); "
    posts_source += "the select stage counts the posts" if count is None else f"{count:,} posts"
    return [
        SizeEstimate(
            "base, final model, diffusers folder", 3 * size, f"{size / GB:.2f} GB each: {parameters:,} numbers, counted"
        ),
        SizeEstimate("LoKr, journal", lokr_bytes(model) + journal, "counted"),
        milestone_lokrs(recipe, model),
        SizeEstimate("posts, captions, schedule", None if count is None else POST_BYTES * count, posts_source),
    ]


def state_sizes(recipe: Recipe, model: ParameterCounts) -> list[SizeEstimate]:
    """The training's work folder at its largest."""
    kept, state, row = milestones(recipe), state_bytes(recipe, model), journal_row_bytes(recipe, model)
    latest, count = recipe.execution.keep_states + 1, steps(recipe) or 0
    source = f"{state / GB:.2f} GB each and the journal, counted; one of them is being written"
    estimates = [SizeEstimate(f"{latest} latest states", latest * (state + row * count), source)]
    if kept:
        every = f"a state every {recipe.train.milestone_every:,} steps of {count:,}"
        estimates.append(SizeEstimate(f"{len(kept)} milestones", len(kept) * state + row * sum(kept), every))
        estimates.append(milestone_lokrs(recipe, model))
    return estimates


def gradient_buffers(recipe: Recipe, ranks: int) -> int:
    """Flat fp32 gradients that a rank holds at once: its part of the tree over the lanes."""
    return max(recipe.schedule.lanes // ranks, 1).bit_length()


def gpu_memory_parts(recipe: Recipe, model: ParameterCounts) -> list[SizeEstimate]:
    """What a training step allocates on each GPU at its peak."""
    train, schedule, ranks = recipe.train, recipe.schedule, recipe.execution.ranks
    weights, buffers = ITEM_BYTES[train.weights], gradient_buffers(recipe, ranks)
    activations = ACTIVATIONS * schedule.batch_size * schedule.area if train.gradient_checkpointing else None
    return [
        SizeEstimate(
            "U-Net, text encoders",
            ITEM_BYTES[train.precision] * (model.unet + model.text),
            f"{train.precision}, counted",
        ),
        SizeEstimate("VAE", 4 * model.vae, "float32, counted"),
        SizeEstimate("LoKr and its gradient", weights * (model.lokr + model.trained), f"{train.weights}, counted"),
        SizeEstimate("optimizer", model.optimizer, "8 bits per number and a scale per block, counted"),
        SizeEstimate(
            "sums of gradients",
            4 * model.trained * buffers,
            f"{buffers} of float32: {schedule.lanes} lanes on {ranks} ranks",
        ),
        SizeEstimate(
            "activations", activations, ACTIVATIONS_SOURCE if activations else "not known without checkpoints"
        ),
    ]


def gpu_memory(recipe: Recipe, model: ParameterCounts) -> int:
    """What is taken as enough GPU memory."""
    return total(gpu_memory_parts(recipe, model)) + GPU_SPARE


def host_memory(recipe: Recipe, model: ParameterCounts) -> int:
    """Main memory while the ranks start: each holds the base, a float32 LoKr and the tables, until the GPU has them.
    Without a GPU a training step is held there too.
    """
    vae = (4 - ITEM_BYTES[recipe.merge.output_dtype]) * model.vae
    most = checkpoint_bytes(recipe, model) + vae + 4 * model.lokr
    if recipe.train.device == "cpu":
        most = max(most, int(CPU_STEP * total(gpu_memory_parts(recipe, model))))
    return recipe.execution.ranks * (most + POST_BYTES * (posts(recipe) or 0) + PROCESS)


def shared_memory(recipe: Recipe) -> int:
    """/dev/shm: images and noise on their way from the loader processes, and NCCL's own."""
    pixels = recipe.schedule.area
    images, noise = 3 * pixels, 2 * 4 * 4 * (pixels // 64)  # uint8 RGB; two float32 tensors of 4 latent channels
    per_process = MICRO_BATCHES_AHEAD * recipe.schedule.batch_size * (images + noise)
    nccl = NCCL_SHARED if recipe.train.device == "cuda" else 0
    return recipe.execution.ranks * recipe.execution.workers * per_process + nccl
