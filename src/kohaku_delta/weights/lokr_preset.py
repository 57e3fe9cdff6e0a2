"""The preset: which layers are trained, and with which factor. A line of it that matches no layer is an error.

The release's preset names classes of sd-scripts' U-Net and paths of the checkpoint; both are translated to diffusers'
modules here. Every linear, convolution and (with `norms`) norm layer inside a named class is trained with the factor of
the innermost such class, as in LyCORIS 2.1. A layer outside all classes is trained if its path in the checkpoint starts
with a named one. A name is a regular expression for whole path components; LyCORIS matched any prefix, so `out` would
also have matched output_blocks, if their classes had not come first.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from kohaku_delta.errors import UserError
from kohaku_delta.params import Preset
from kohaku_delta.sdxl.tensor_names import PREFIX, Layout, TensorNameMap

# sd-scripts' class -> the classes of diffusers and transformers that hold the same layers
CLASSES = {
    "CrossAttention": ("Attention",),
    "FeedForward": ("FeedForward",),
    "Transformer2DModel": ("Transformer2DModel",),
    "ResnetBlock2D": ("ResnetBlock2D",),
    "Downsample2D": ("Downsample2D",),
    "Upsample2D": ("Upsample2D",),
    "CLIPAttention": ("CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2"),
    "CLIPMLP": ("CLIPMLP",),
}


class LokrTarget(NamedTuple):
    """One trained layer."""

    part: str  # unet | te1 | te2
    path: str  # modules[part].get_submodule(path)
    lora: str  # the module's name in the LoKr file
    algorithm: Literal["lokr", "norm"]
    factor: int  # of a norm: 1, without meaning


def lokr_targets(modules: Mapping[str, torch.nn.Module], preset: Preset) -> list[LokrTarget]:
    """The trained layers of {"unet": …, "te1": …, "te2": …}, text encoders first, in the modules' own order."""
    unknown = sorted(set(preset.modules) - set(CLASSES))
    if unknown:
        raise UserError(
            f"lokr.preset.modules names {', '.join(unknown)}, which is not a class of SDXL's U-Net or text encoders. "
            f"Known: {', '.join(CLASSES)}."
        )
    wanted = {theirs: ours for ours, factor in preset.modules.items() for theirs in CLASSES[ours]}
    names = TensorNameMap(Layout.of_modules(modules))
    patterns = {name: re.compile(rf"(?:{name})(?:\.|$)") for name in preset.names}
    factors = preset.names | preset.modules
    matched: set[str] = set()
    targets: list[LokrTarget] = []
    for part in ("te1", "te2", "unet"):
        if part not in modules:
            continue
        kinds = {path: type(module).__name__ for path, module in modules[part].named_modules()}
        for path, module in modules[part].named_modules():
            norm = isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
            if not (norm and preset.norms) and not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                continue
            entry = names.by_path[part, f"{path}.weight"]
            rule = next((wanted[kind] for above in _ancestors(path) if (kind := kinds[above]) in wanted), None)
            if rule is None and part == "unet":
                inside = entry.key.removeprefix(PREFIX["unet"])
                rule = next((name for name, pattern in patterns.items() if pattern.match(inside)), None)
            if rule is None or entry.lora is None:
                continue
            matched.add(rule)
            factor = 1 if norm else factors[rule]
            targets.append(LokrTarget(part, path, entry.lora, "norm" if norm else "lokr", factor))
    unmatched = [name for name in (*preset.modules, *preset.names) if name not in matched]
    if unmatched:
        raise UserError(
            f"lokr.preset: {', '.join(unmatched)} matches no layer of this model. A target that trains nothing is a "
            "mistake: remove it or correct it."
        )
    return targets


def require_full_matrices(dim: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if LyCORIS would split one of these weights ({"<name>.lokr_w2": shape, …}) into two of rank
    `dim`, which this recipe does not train.
    """
    sides = {name: max(shape[:2]) for name, shape in shapes.items() if name.endswith(".lokr_w2")}
    largest = max(sides, key=lambda name: sides[name], default="")
    if largest and dim < sides[largest] / 2:
        raise UserError(
            f"lokr.dim is {dim}, and {largest} has the shape {list(shapes[largest])}: with a dim below half of a side "
            "LyCORIS trains two small matrices instead, and this recipe trains full ones only. Set lokr.dim to "
            f"{-(-sides[largest] // 2)} or more."
        )


def _ancestors(path: str):
    """The paths around a module, innermost first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
    yield ""
