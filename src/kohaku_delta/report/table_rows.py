"""Invariant: every figure comes from what the stages ran with or from what they wrote; none is typed in here.

Rows of (what, value) as plain text, which the page and the card show alike.
"""

import math

from kohaku_delta.report.build_summary import Build
from kohaku_delta.training import buckets


def format_number(value: float) -> str:
    """A parameter as people write it: 4e-05, 0.1, 10,000."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def format_size(count: int) -> str:
    """Bytes, rounded as people say them."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{count} bytes"


def format_duration(seconds: float) -> str:
    """Two units at most: 17 d 4 h, 2 min 5 s, 0.8 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left, parts = round(seconds), []
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= unit or parts:
            parts.append(f"{left // unit} {name}")
            left %= unit
    return " ".join(parts[:2])


def start(build: Build) -> str:
    """What the training started from."""
    merge = build.recipe.merge
    if merge.start == "published":
        return "the published delta base"
    parts = " + ".join(f"{weight:g} × {name}" for name, weight in merge.weights.items())
    donors = (
        f", each parent with {len(merge.donor_embeddings)} embeddings of SDXL 1.0" if merge.donor_embeddings else ""
    )
    return f"{parts}{donors}; summed in {merge.compute_dtype}, kept in {merge.output_dtype}"


def steps(build: Build) -> int | None:
    """Steps that were trained."""
    return len(build.curves["step"]) if build.curves else None


def training(build: Build) -> list[tuple[str, str]]:
    """How it was trained."""
    recipe, dataset = build.recipe, build.dataset
    schedule, train, lokr = recipe.schedule, recipe.train, recipe.lokr
    trained, side = steps(build), math.isqrt(schedule.area)
    factors: dict[int, list[str]] = {}
    for name, factor in (lokr.preset.modules | lokr.preset.names).items():
        factors.setdefault(factor, []).append(name)
    targets = "; ".join(f"factor {factor}: {', '.join(names)}" for factor, names in sorted(factors.items()))
    rates = (
        f"U-Net {format_number(train.learning_rate_unet)}, both text encoders {format_number(train.learning_rate_text)}"
    )
    divided = "as a whole one" if train.last_step_divisor == "full" else "by what it holds"
    sides = f"sides {schedule.min_side} to {schedule.max_side} in steps of {schedule.side_step}"
    used = (
        f"; {len(build.buckets)} of {len(buckets.all_buckets(schedule))} buckets have images" if build.buckets else ""
    )
    order = "shuffled" if train.shuffle_caption else "in order"
    images, epochs = "not counted: the statistics stage has not run", "none: the train stage has not run"
    if dataset:
        images = f"{dataset.trained:,} posts, of {dataset.selected:,} selected by {dataset.drawn:,} draws"
    if trained:
        epochs = f"{trained:,} ({schedule.epochs} epoch{'s' if schedule.epochs > 1 else ''})"
    return [
        ("Start", start(build)),
        ("Images", images),
        ("Steps", epochs),
        (
            "Batch",
            f"{schedule.batch_size * schedule.micro_batches:,} images a step ({schedule.batch_size} × {schedule.micro_batches} micro-batches, in {schedule.lanes} lanes)",
        ),
        (
            "Optimizer",
            f"{train.optimizer}, betas {', '.join(map(format_number, train.betas))}, weight decay {format_number(train.weight_decay)}",
        ),
        ("Learning rate", f"{rates}; constant after {train.warmup_steps} warm-up steps"),
        ("Gradient", f"clipped at norm {format_number(train.clip_norm)}; the last, partial step is divided {divided}"),
        ("Precision", f"{train.precision}, LoKr weights in {train.weights}"),
        ("LoKr", f"dim {format_number(lokr.dim)}, alpha {format_number(lokr.alpha)}; {targets}"),
        ("Norm layers", "trained as full differences" if lokr.preset.norms else "not trained"),
        ("Resolution", f"buckets of the area of {side} × {side} pixels, {sides}{used}"),
        (
            "Captions",
            f"up to {train.max_token_length} tokens; {order}, {format_number(100 * train.tag_dropout)} % of general tags dropped at each visit",
        ),
        ("Noise", f"offset {format_number(train.noise_offset)}; min-SNR γ {format_number(train.min_snr_gamma)}"),
        ("Crop conditioning", train.crop_conditioning),
        (
            "Seeds",
            f"selection {recipe.selection.seed}, schedule {schedule.seed}, LoKr {lokr.seed}, training {train.seed}",
        ),
        ("Bake", f"base + LoKr × {format_number(recipe.bake.scale)}"),
    ]


def quality(build: Build) -> list[tuple[str, str]]:
    """Quality tags, best first, and the favourites that each needs, by rating."""
    caption = build.recipe.caption
    rows = []
    for place, tag in enumerate(caption.quality):
        last = place == len(caption.quality) - 1
        sign = "≤" if last else ">"
        needs = ", ".join(
            f"{' + '.join(caption.ratings[rating])} {sign} {above[place - last]}"
            for rating, above in caption.quality_above.items()
        )
        rows.append((tag, needs))
    return rows


def years(build: Build) -> list[tuple[str, str]]:
    """Date tags and the years of each."""
    caption, rows, first = build.recipe.caption, [], build.recipe.caption.first_year
    if caption.before_first_year:
        rows.append((caption.before_first_year, f"before {first}, and unreadable dates"))
    for last, tag in caption.years.items():
        rows.append((tag, f"{first} to {last}"))
        first = last + 1
    return rows
