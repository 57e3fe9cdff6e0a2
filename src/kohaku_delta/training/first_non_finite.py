"""Where the numbers of a micro-batch go wrong first."""

from collections.abc import Callable

import torch
from torch import nn

from kohaku_delta.errors import UserError
from kohaku_delta.training.batch_builder import Batch
from kohaku_delta.training.lokr import LokrAdapter
from kohaku_delta.training.sdxl_model import Sdxl


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def first_non_finite(model: Sdxl, adapter: LokrAdapter, batch: Batch) -> str:
    """Which is the first of weights, latents, layers of the text encoders and the U-Net, and the loss; as a clause.

    Computes the forward pass once more, with a look at every layer's output.
    """
    for owner, modules in (("LoKr", {"adapter": adapter}), ("base", model.models)):
        for part, module in modules.items():
            for name, weight in module.named_parameters():
                if not _is_finite(weight):
                    return f"the {owner}'s weight {part}.{name} is not finite"
    found: list[str] = []

    def looks_at(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            if not found and torch.is_tensor(output) and output.is_floating_point() and not _is_finite(output):
                found.append(f"{name} ({str(output.dtype).removeprefix('torch.')})")

        return hook

    hooks = [
        layer.register_forward_hook(looks_at(f"{part}.{name}"))
        for part in ("te1", "te2", "unet")
        for name, layer in model.models[part].named_modules()
        if not list(layer.children())
    ]
    try:
        model.losses(batch)
    except UserError as error:  # the latents
        return error.message
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"weights and latents are finite, the first layer whose output is not is {found[0]}"
    return "weights, latents and all layers' outputs are finite, the loss itself is not"
