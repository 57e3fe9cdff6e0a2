"""Invariant: every number is computed from the recipe, counted on the model, or carries the name of who measured it.

Bytes are decimal (1 GB = 10^9). Where a size is only known as a range, the larger end counts.
"""

from dataclasses import dataclass
from math import ceil

from kohaku_delta.hub import pins
from kohaku_delta.params import Pin, Recipe
from kohaku_delta.preflight.parameter_counts import ParameterCounts, checkpoints

GB = 10**9
# what others measured or published
RELEASE_TARS = 2001
TARS = 1600 * GB, "about 1.3–1.6 TB: the webp set as its users report it; no size is pinned"
INDEX = 2 * GB, "the public index has about 0.9 MB a tar"
RELEASE = {
    "gpus": 2,
    "gpu": "RTX 3090",
    "memory": 24 * GB,
    "seconds": 51.25,
    "who": "the release, model card: 51–51.5 s a step on two RTX 3090",
}
CAPTION = 700  # bytes a post in posts and captions: 0.25 billion tags of 7 million posts are 35 a post; 20 bytes each
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
AHEAD = 5  # micro-batches a loader process has in shared memory: those of training/batch_builder.py and the one in hand
NCCL_SHARED = GB  # what NVIDIA's documentation of NCCL asks of a container (--shm-size=1g)


@dataclass(frozen=True)
class SizeEstimate:
    """So many bytes, what for, and how they are known; None: nobody knows before the download."""

    what: str
    bytes: int | None
    source: str


def wanted_posts(recipe: Recipe) -> list[tuple[str, Pin]]:
    """(name, pin) of what the recipe reads. A pin with a span in its url says many files; its bytes are those of all."""
    unused = {"delta_base"} if recipe.merge.start == "merge" else {"gamma", "beta"}
    unused |= {"index"} if recipe.download.images == "all" else set()
    return [
        (name, pin)
        for name, pinned in recipe.download.inputs.items()
        if name not in unused
        for pin in (pinned if isinstance(pinned, list) else [pinned])
    ]


def steps(recipe: Recipe) -> int | None:
    """Steps of the whole training; None where only the schedule stage will tell."""
    return recipe.published.dataset.steps if recipe.published else None


def posts(recipe: Recipe) -> int | None:
    """Posts that are trained on, at most; None if a range takes all of a database that nobody counted."""
    if recipe.published:
        return recipe.published.dataset.posts
    draws = [each.draw for each in recipe.selection.ranges]
    return None if "all" in draws else sum(draws)


def checkpoint_bytes(recipe: Recipe, numbers: ParameterCounts) -> int:
    """Bytes of a whole model as merge and bake write it."""
    return SIZES[recipe.merge.output_dtype] * (numbers.unet + numbers.text + numbers.vae)


def download_sizes(recipe: Recipe, numbers: ParameterCounts | None) -> list[SizeEstimate]:
    """What the network brings into the mirror. numbers: None if the model's size is not known."""
    remote = [(name, pin) for name, pin in wanted_posts(recipe) if pin.url.startswith("hf://")]
    found = []
    for name in dict.fromkeys(name for name, _ in remote):
        own = [pin for each, pin in remote if each == name]
        files = sum(map(pins.span_files, own))
        if None not in [pin.bytes for pin in own]:
            found.append(SizeEstimate(name, sum(pin.bytes for pin in own), "pinned"))
        elif name == "tars" and files == RELEASE_TARS:
            found.append(SizeEstimate(f"{files:,} tars", *TARS))
        elif name == "index" and files == RELEASE_TARS:
            found.append(SizeEstimate(f"{files:,} lists", *INDEX))
        elif name in checkpoints(recipe) and numbers:
            found.append(
                SizeEstimate(name, checkpoint_bytes(recipe, numbers), f"no size is pinned: that of {numbers.of}")
            )
        else:
            found.append(SizeEstimate(name, None, "no size is pinned: `kohaku-delta pin` asks the hub for it"))
    return found


def lokr_bytes(numbers: ParameterCounts) -> int:
    """Bytes of a LoKr file's tensors, which is always fp16."""
    return 2 * numbers.lokr


def state_bytes(recipe: Recipe, numbers: ParameterCounts) -> int:
    """Bytes of a saved state without its journal: weights and 8-bit optimizer state."""
    return SIZES[recipe.train.weights] * numbers.lokr + numbers.optimizer


def journal_row(recipe: Recipe, numbers: ParameterCounts) -> int:
    """Bytes of a step in the journal: a loss a micro-batch, a fingerprint a lane, a byte a tensor, two sha256 as text,
    nine numbers.
    """
    return 4 * recipe.schedule.micro_batches + 8 * recipe.schedule.lanes + numbers.entries + 2 * 64 + 9 * 8


def milestones(recipe: Recipe) -> list[int]:
    """The steps whose states and LoKr files are kept for good."""
    every = recipe.execution.milestone_every
    return list(range(every, (steps(recipe) or 0) + 1, every))


def state_sizes(recipe: Recipe, numbers: ParameterCounts) -> list[SizeEstimate]:
    """The training's state folder at its fullest."""
    kept, one, row = milestones(recipe), state_bytes(recipe, numbers), journal_row(recipe, numbers)
    last, count = recipe.execution.keep_states + 1, steps(recipe) or 0
    found = [
        SizeEstimate(
            f"{last} last states",
            last * (one + row * count),
            f"{one / GB:.2f} GB each and the journal, by count; one is being written",
        )
    ]
    if kept:
        every = f"a state every {recipe.execution.milestone_every:,} steps of {count:,} (the card)"
        each = f"{lokr_bytes(numbers) / 1e6:.0f} MB each: {numbers.lokr:,} numbers of fp16, counted"
        found.append(SizeEstimate(f"{len(kept)} milestones", len(kept) * one + row * sum(kept), every))
        found.append(SizeEstimate(f"{len(kept)} LoKr files", len(kept) * lokr_bytes(numbers), each))
    return found


def build_sizes(recipe: Recipe, numbers: ParameterCounts) -> list[SizeEstimate]:
    """What the stages write; DVC keeps a second copy in its cache, unless the file system can share blocks."""
    whole = checkpoint_bytes(recipe, numbers)
    return [
        SizeEstimate(
            "base, final model, diffusers folder",
            3 * whole,
            f"{whole / GB:.2f} GB each: {numbers.unet + numbers.text + numbers.vae:,} numbers, counted",
        ),
        SizeEstimate(
            "LoKr, journal", lokr_bytes(numbers) + journal_row(recipe, numbers) * (steps(recipe) or 0), "by count"
        ),
        _tables(recipe),
    ]


def _tables(recipe: Recipe) -> SizeEstimate:
    count = posts(recipe)
    if count is None:
        return SizeEstimate(
            "posts, captions, schedule",
            None,
            f"{CAPTION} bytes a post at most (an estimate); the select stage counts the posts",
        )
    return SizeEstimate(
        "posts, captions, schedule", CAPTION * count, f"{count:,} posts, {CAPTION} bytes each at most: an estimate"
    )


def buffers(recipe: Recipe, ranks: int) -> int:
    """Flat fp32 gradients that a rank holds at once: its part of the lanes' tree, or what it gathers of the others'
    beside its own.
    """
    share = max(recipe.schedule.lanes // ranks, 1)
    return max(share.bit_length(), ranks + 1 if ranks > 1 else 1)


def gpu_memory_parts(recipe: Recipe, numbers: ParameterCounts, ranks: int) -> list[SizeEstimate]:
    """What lies in a GPU's memory all the time. Activations are not in it: nobody measured them for this code."""
    size, weight, held = SIZES[recipe.train.precision], SIZES[recipe.train.weights], buffers(recipe, ranks)
    return [
        SizeEstimate(
            "U-Net, text encoders", size * (numbers.unet + numbers.text), f"{recipe.train.precision}, counted"
        ),
        SizeEstimate("VAE", 4 * numbers.vae, "float32, counted"),
        SizeEstimate(
            "LoKr and its gradient", weight * (numbers.lokr + numbers.trained), f"{recipe.train.weights}, counted"
        ),
        SizeEstimate("optimizer", numbers.optimizer, "8 bits and a scale a block, counted"),
        SizeEstimate(
            "sums of gradients",
            4 * numbers.trained * held,
            f"{held} of float32: {recipe.schedule.lanes} lanes on {ranks} ranks",
        ),
    ]


def gpu_memory(recipe: Recipe, numbers: ParameterCounts, ranks: int) -> int:
    """The least GPU memory that is taken for enough: the release's cards, and what more ranks than the release's add to
    the sums.
    """
    more = 4 * numbers.trained * max(0, buffers(recipe, ranks) - buffers(recipe, RELEASE["gpus"]))
    return RELEASE["memory"] + more


def host_memory(recipe: Recipe, numbers: ParameterCounts, ranks: int) -> int:
    """Main memory while the ranks begin: each reads the base and the tables before the card takes them."""
    return ranks * (checkpoint_bytes(recipe, numbers) + lokr_bytes(numbers) + CAPTION * (posts(recipe) or 0))


def shared_memory(recipe: Recipe, ranks: int) -> int:
    """/dev/shm: pictures and noise on their way from the loader's processes, and NCCL's own."""
    area, latent = recipe.schedule.area, recipe.schedule.area // 64
    batch = recipe.schedule.batch_size * (3 * area + 2 * 4 * 4 * latent)
    return ranks * recipe.execution.workers * AHEAD * batch + (NCCL_SHARED if recipe.train.device == "cuda" else 0)


def total(needs: list[SizeEstimate]) -> int:
    """The sum of what is known."""
    return sum(each.bytes or 0 for each in needs)


def days(count: int, seconds: float) -> float:
    return ceil(count * seconds) / 86400
