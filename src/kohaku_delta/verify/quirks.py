"""Invariant: what is said of the release's quirks is read from params.yaml, one line for each key that docs/fidelity.md
names.
"""

import hashlib
from math import inf

import numpy as np

from kohaku_delta.params import Recipe
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.consistency import LOKR
from kohaku_delta.verify.findings import PASS, SKIP, Finding, format_some, pass_or_fail

GROUP = "fidelity"


def quirks(recipe: Recipe) -> dict[str, bool]:
    """key → whether the recipe copies what the release did there (False: it repairs it)."""
    posts = [each.draw == "all" for each in recipe.selection.ranges]
    return {
        "selection.replacement": recipe.selection.replacement and not all(posts),
        "caption.before_first_year": recipe.caption.before_first_year == "early",
        "caption.no_quality_above_id": (recipe.caption.no_quality_above_id or inf) <= 7_000_000,
        "lokr.forward": recipe.lokr.forward == "delta",
        "train.crop_conditioning": recipe.train.crop_conditioning == "letterbox",
        "train.timestep_freq_shift": recipe.train.timestep_freq_shift == 1,
        "train.text_projection": recipe.train.text_projection == "transposed",
        "train.last_step_divisor": recipe.train.last_step_divisor == "full",
    }


# what no parameter can bring back: docs/fidelity.md says why
REPAIRED = (
    "noise shared by two GPUs",
    "a first batch from an older shuffle",
    "data begun anew on resume",
    "NaN of a float16 VAE",
    "sums in the order of processes",
)


def quirks_finding(rebuild: Artifact) -> Finding:
    """Which quirks this recipe copies, and which it repairs."""
    found = quirks(rebuild.recipe)
    copied, repaired = ([key for key, value in found.items() if value is wanted] for wanted in (True, False))
    warm_up = (
        f"train.warmup_steps is {rebuild.recipe.train.warmup_steps} (the release's 100 advanced twice an update: 50)"
    )
    return Finding(
        GROUP,
        "quirks",
        PASS,
        f"copied: {', '.join(copied) or 'none'}; repaired by parameter: {', '.join(repaired) or 'none'}; {warm_up}; always repaired: {', '.join(REPAIRED)}",
    )


def check_untrained_layer(rebuild: Artifact) -> Finding:
    """Text encoder 1's last layer gets no gradient (its output before that layer is used), so all its lokr_w2 are 0: a
    free check on any result.
    """
    if LOKR not in rebuild.tensors:
        return Finding(GROUP, "untouched", SKIP, f"{LOKR} and its digests are not there")
    tensors = rebuild.tensors[LOKR].tensors
    layers = {
        int(name.split("_layers_")[1].split("_")[0])
        for name in tensors
        if name.startswith("lora_te1_text_model_encoder_layers_")
    }
    last = f"lora_te1_text_model_encoder_layers_{max(layers, default=0)}_"
    ends = {name: each for name, each in tensors.items() if name.startswith("lora_te1_") and name.endswith(".lokr_w2")}
    if not ends:
        return Finding(GROUP, "untouched", SKIP, f"{LOKR} has no text encoder 1")
    zero = {
        name: each.sha256 == hashlib.sha256(np.zeros(each.shape, np.float16).tobytes()).hexdigest()
        for name, each in ends.items()
    }
    moved = [name for name, nil in zero.items() if name.startswith(last) and not nil]
    still = [name for name, nil in zero.items() if not name.startswith(last) and nil]
    faults = [f"{format_some(moved)} was trained, and gets no gradient"] if moved else []
    faults += (
        [f"{format_some(still)} is still 0: it was not trained"]
        if still and rebuild.recipe.train.learning_rate_text
        else []
    )
    return pass_or_fail(
        GROUP,
        "untouched",
        faults,
        f"text encoder 1's last layer is untouched: {sum(zero.values())} of its lokr_w2 are 0; {len(zero) - sum(zero.values())} of the other layers are not",
    )
