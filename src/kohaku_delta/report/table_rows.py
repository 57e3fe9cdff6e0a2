"""Rows of (what, value) as plain text, which the page and the card share.

Every figure comes from what the stages ran with or from what they wrote.
"""

import math
from pathlib import PurePosixPath

from kohaku_delta.params import NETWORK_WEIGHTS, Percentiles
from kohaku_delta.report.build_summary import Build
from kohaku_delta.training import buckets


def format_number(value: float) -> str:
    """A parameter as people write it: 4e-05, 0.1, 10,000."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def training(build: Build) -> list[tuple[str, str]]:
    """How it was trained."""
    recipe, number = build.recipe, format_number
    schedule, train, lokr = recipe.schedule, recipe.train, recipe.lokr
    side = math.isqrt(schedule.area)
    batch = schedule.batch_size * schedule.micro_batches
    used = (
        f"; {len(build.buckets)} of {len(buckets.all_buckets(schedule))} buckets have images" if build.buckets else ""
    )
    return [
        ("Start", _start(build)),
        ("Images", _images(build)),
        ("Steps", _steps(build)),
        (
            "Batch",
            f"{batch:,} images per step ({schedule.batch_size} × {schedule.micro_batches} micro-batches, "
            f"in {schedule.lanes} lanes)",
        ),
        (
            "Optimizer",
            f"{train.optimizer}, betas {', '.join(map(number, train.betas))}, "
            f"weight decay {number(train.weight_decay)}",
        ),
        (
            "Learning rate",
            f"U-Net {number(train.learning_rate_unet)}, both text encoders {number(train.learning_rate_text)}; "
            f"constant after {train.warmup_steps} warm-up steps",
        ),
        (
            "Gradient",
            f"clipped at norm {number(train.clip_norm)}; the last, partial step is divided "
            + ("like a full one" if train.last_step_divisor == "full" else "by what it holds"),
        ),
        ("Precision", f"{train.precision}, LoKr weights in {train.weights}"),
        ("LoKr", f"dim {number(lokr.dim)}, alpha {number(lokr.alpha)}; {_lokr_targets(build)}"),
        ("Norm layers", "trained as full differences" if lokr.preset.norms else "not trained"),
        (
            "Resolution",
            f"buckets of the area of {side} × {side} pixels, sides {schedule.min_side} to {schedule.max_side} "
            f"in steps of {schedule.side_step}{used}",
        ),
        (
            "Captions",
            f"up to {train.max_token_length} tokens; {'shuffled' if train.shuffle_caption else 'in order'}, "
            f"{number(100 * train.tag_dropout)} % of general tags dropped at each visit",
        ),
        ("Noise", f"offset {number(train.noise_offset)}; min-SNR γ {number(train.min_snr_gamma)}"),
        ("Crop conditioning", train.crop_conditioning),
        (
            "Seeds",
            f"selection {recipe.selection.seed}, schedule {schedule.seed}, LoKr {lokr.seed}, training {train.seed}",
        ),
        ("Bake", f"base + LoKr × {number(recipe.bake.scale)}"),
    ]


def _start(build: Build) -> str:
    start = next((source for source in build.sources if source.name == NETWORK_WEIGHTS), None)
    if start:
        name = PurePosixPath(start.url).name
        return f"{_base(build)}, with the LoKr {name} (sha256 {start.sha256}); optimizer and learning rates anew"
    return _base(build)


def _base(build: Build) -> str:
    merge = build.recipe.merge
    if merge.start == "published":
        return "the published delta base"
    parents = " + ".join(f"{weight:g} × {name}" for name, weight in merge.weights.items())
    count = len(merge.donor_embeddings)
    donor = f", each parent with {count} embeddings of SDXL 1.0" if count else ""
    return f"{parents}{donor}; summed in {merge.compute_dtype}, kept in {merge.output_dtype}"


def _images(build: Build) -> str:
    dataset = build.dataset
    if not dataset:
        return "not counted: the statistics stage has not run"
    return f"{dataset.trained:,} posts, of {dataset.selected:,} selected by {dataset.drawn:,} draws"


def _steps(build: Build) -> str:
    epochs = build.recipe.schedule.epochs
    if not build.steps:
        return "none: the train stage has not run"
    return f"{build.steps:,} ({epochs} epoch{'s' if epochs > 1 else ''})"


def _lokr_targets(build: Build) -> str:
    preset = build.recipe.lokr.preset
    names_by_factor: dict[int, list[str]] = {}
    for name, factor in (preset.modules | preset.names).items():
        names_by_factor.setdefault(factor, []).append(name)
    return "; ".join(f"factor {factor}: {', '.join(names)}" for factor, names in sorted(names_by_factor.items()))


def quality_tags(build: Build) -> list[tuple[str, str]]:
    """Quality tags, best first, and the favourites that each needs, by rating."""
    caption = build.recipe.caption
    if isinstance(caption.quality_above, Percentiles):
        above = caption.quality_above.percentiles
        needs = [*(f"> percentile {each} of its rating" for each in above), f"≤ percentile {above[-1]} of its rating"]
        return list(zip(caption.quality, needs, strict=True))
    rows = []
    for index, tag in enumerate(caption.quality):
        last = index == len(caption.quality) - 1  # the lowest tag has the bound of the one above it
        bounds = [
            f"{' + '.join(caption.ratings[rating])} {'≤' if last else '>'} {above[index - last]}"
            for rating, above in caption.quality_above.items()
        ]
        rows.append((tag, ", ".join(bounds)))
    return rows


def date_tags(build: Build) -> list[tuple[str, str]]:
    """Date tags and the years of each."""
    caption = build.recipe.caption
    first, rows = caption.first_year, []
    if caption.before_first_year:
        rows.append((caption.before_first_year, f"before {first}, and unreadable dates"))
    for last, tag in caption.years.items():
        rows.append((tag, f"{first} to {last}"))
        first = last + 1
    return rows


def milestones(build: Build) -> list[str]:
    """`base: 0.1234`, `2,000: 0.1234` for milestones and final model, in SDXL's form; empty without a held-out post."""
    found = build.milestones
    pairs = zip(found["step"], found["held_out_loss"], strict=True) if found else ()
    return [f"{f'{step:,.0f}' if step else 'base'}: {loss:.4f}" for step, loss in pairs if math.isfinite(loss)]
