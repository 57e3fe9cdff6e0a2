"""The checks fidelity/quirks and untouched: which quirks of the release (docs/fidelity.md) this recipe copies."""

import hashlib
import re
from math import inf, prod

from kohaku_delta import paths
from kohaku_delta.params import Recipe
from kohaku_delta.printing import format_some
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.verify.findings import Check, Skip, check

LAYER = re.compile(r"lora_te1_text_model_encoder_layers_(\d{1,3})_")
LARGEST = 1 << 26  # numbers of a lokr_w2; the release's have up to 1.6 million

# no parameter brings these back; docs/fidelity.md says why
ALWAYS_REPAIRED = (
    "noise shared by two GPUs",
    "a first batch from an older shuffle",
    "data begun again on resume",
    "NaN of a float16 VAE",
    "sums in the order of processes",
)


def quirks(recipe: Recipe) -> dict[str, bool]:
    """Key of params.yaml → whether the recipe copies what the release did (False: it repairs it)."""
    return {
        "selection.replacement": recipe.selection.replacement
        and any(posts.draw != "all" for posts in recipe.selection.ranges),
        "filter.exif_rotation": not recipe.filter.exif_rotation,
        "filter.reencode_webp": not recipe.filter.reencode_webp,
        "caption.before_first_year": recipe.caption.before_first_year == "early",
        "caption.no_quality_above_id": (recipe.caption.no_quality_above_id or inf) <= 7_000_000,
        "lokr.forward": recipe.lokr.forward == "delta",
        "train.crop_conditioning": recipe.train.crop_conditioning == "letterbox",
        "train.timestep_freq_shift": recipe.train.timestep_freq_shift == 1,
        "train.text_projection": recipe.train.text_projection == "transposed",
        "train.last_step_divisor": recipe.train.last_step_divisor == "full",
    }


@check("fidelity/quirks")
def check_quirks(rebuild: Artifact) -> str:
    """Lists the quirks that this recipe copies, and those that it repairs."""
    copied = [key for key, is_copied in quirks(rebuild.recipe).items() if is_copied]
    repaired = [key for key, is_copied in quirks(rebuild.recipe).items() if not is_copied]
    warmup = rebuild.recipe.train.warmup_steps
    return (
        f"copied: {', '.join(copied) or 'none'}; repaired by parameter: {', '.join(repaired) or 'none'}; "
        f"train.warmup_steps is {warmup} (the release's 100 advanced twice per update: 50); "
        f"always repaired: {', '.join(ALWAYS_REPAIRED)}"
    )


@check("fidelity/untouched")
def check_untrained_layer(rebuild: Artifact) -> Check:
    """Text encoder 1's last layer gets no gradient (the output before that layer is used), so all its lokr_w2 are 0."""
    if paths.LOKR not in rebuild.tensors:
        raise Skip(f"{paths.LOKR} and its digests do not exist")
    tensors = rebuild.tensors[paths.LOKR].tensors
    layers = {name: int(match[1]) for name in tensors if (match := LAYER.match(name))}
    text_encoder = {
        name: tensor for name, tensor in tensors.items() if name.startswith("lora_te1_") and name.endswith(".lokr_w2")
    }
    zeros = _hashes_of_zeros({prod(tensor.shape) for tensor in text_encoder.values()})
    is_zero = {name: tensor.sha256 == zeros.get(prod(tensor.shape)) for name, tensor in text_encoder.items()}
    if not is_zero:
        raise Skip(f"{paths.LOKR} has no text encoder 1")
    last = {name for name, layer in layers.items() if layer == max(layers.values())}
    if not last & is_zero.keys():
        raise Skip(f"{paths.LOKR} has no lokr_w2 of text encoder 1's last layer")
    trained = [name for name, zero in is_zero.items() if name in last and not zero]
    if trained and rebuild.start:
        raise Skip(f"{format_some(trained)} is not 0: it may be that of the LoKr that the training began with")
    if trained:
        yield f"{format_some(trained)} was trained, and gets no gradient"
    untrained = [name for name, zero in is_zero.items() if name not in last and zero]
    if untrained and rebuild.recipe.train.learning_rate_text:
        yield f"{format_some(untrained)} is still 0: it was not trained"
    return (
        f"text encoder 1's last layer is untouched: {sum(is_zero.values())} of its lokr_w2 are 0; "
        f"{len(is_zero) - sum(is_zero.values())} of the other layers are not"
    )


def _hashes_of_zeros(counts: set[int]) -> dict[int, str]:
    """Count → sha256 of as many float16 numbers +0, of the counts up to LARGEST; computed in one go."""
    digest, done, hashes = hashlib.sha256(), 0, {}
    for count in sorted(count for count in counts if count <= LARGEST):
        while done < count:
            step = min(count - done, 1 << 20)
            digest.update(bytes(2 * step))
            done += step
        hashes[count] = digest.hexdigest()
    return hashes
