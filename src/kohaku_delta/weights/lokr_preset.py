"""Invariant: the preset names what is trained, all of it, once; a line of it that matches nothing is an error.

The release's preset speaks of sd-scripts' U-Net classes and of the checkpoint's paths; both are translated here to
diffusers' modules. Every linear, convolution and (with `norms`) norm layer inside a named class is trained with the
factor of the innermost such class around it, as LyCORIS 2.1 walks a model; layers outside all classes are trained when
their path in the checkpoint begins with a named one. A name is a regular expression for whole path components: LyCORIS
took any beginning, so that `out` would also have met output_blocks, had those not been taken by their classes before.
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
    """One trained layer: where it is, what it is called in the LoKr file, and how it is trained (norm: the factor means
    nothing and is 1).
    """

    part: str  # unet | te1 | te2
    path: str  # modules[part].get_submodule(path)
    lora: str
    algorithm: Literal["lokr", "norm"]
    factor: int


def lokr_targets(modules: Mapping[str, torch.nn.Module], preset: Preset) -> list[LokrTarget]:
    """The trained layers of {"unet": …, "te1": …, "te2": …}, text encoders first, in the modules' own order."""
    unknown = sorted(set(preset.modules) - set(CLASSES))
    if unknown:
        raise UserError(
            f"lokr.preset.modules names {', '.join(unknown)}, which is not a class of SDXL's U-Net or text encoders. Known: {', '.join(CLASSES)}."
        )
    wanted = {theirs: ours for ours, factor in preset.modules.items() for theirs in CLASSES[ours]}
    names = TensorNameMap(Layout.of_modules(modules))
    patterns = {name: re.compile(rf"(?:{name})(?:\.|$)") for name in preset.names}
    met: set[str] = set()
    found: list[LokrTarget] = []
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
            factor = preset.modules[rule] if rule else None
            if rule is None and part == "unet":
                inside = entry.key.removeprefix(PREFIX["unet"])
                rule = next((name for name, pattern in patterns.items() if pattern.match(inside)), None)
                factor = preset.names[rule] if rule else None
            if rule is None:
                continue
            met.add(rule)
            found.append(LokrTarget(part, path, entry.lora, "norm" if norm else "lokr", 1 if norm else factor))
    unmet = [name for name in (*preset.modules, *preset.names) if name not in met]
    if unmet:
        raise UserError(
            f"lokr.preset: {', '.join(unmet)} matches no layer of this model. A target that trains nothing is a mistake: remove it or correct it."
        )
    return found


def _ancestors(path: str):
    """The paths around a module, innermost first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
    yield ""
