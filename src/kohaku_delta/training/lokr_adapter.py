"""Invariant: the LoKr on a model is what the preset says, no entry more or less, and starts from weights that only the
seed and the name decide.

Which module of the model carries one, under which name and with which factor is told by `checkpoint.preset` (LyCORIS's
own walk matches by diffusers' class and path names, which moved). `lokr.forward` says how it is computed: from the
factors (training/lokr_layer.py), or through ΔW by LyCORIS's modules, which DoRA needs.
"""

import hashlib

import numpy as np
import torch
from torch import nn

from kohaku_delta.params import Lokr
from kohaku_delta.training.lokr_layer import LokrLayer
from kohaku_delta.weights import lokr_preset


def init_weight(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """kaiming_uniform(a = √5) of a 2-d weight: uniform in ±1/√fan_in, float32, keyed by (seed, name)."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(key=[seed, key])).random(shape)
    return torch.from_numpy(((2 * drawn - 1) / np.sqrt(shape[1])).astype(np.float32))


class LokrAdapter(nn.Module):
    """All LoKr and norm entries of the U-Net and both text encoders. `entries`: LoKr file name → LyCORIS module, sorted
    by name.
    """

    def __init__(self, models: dict[str, nn.Module], parameters: Lokr, dtype: torch.dtype):
        super().__init__()
        from lycoris.modules.lokr import LokrModule
        from lycoris.modules.norms import NormModule

        self.entries: dict[str, nn.Module] = {}
        for target in lokr_preset.lokr_targets(
            {part: models[part] for part in ("te1", "te2", "unet")}, parameters.preset
        ):
            module = models[target.part].get_submodule(target.path)
            if target.algorithm == "norm":
                entry = NormModule(target.lora, module)
            else:
                if parameters.forward == "factors":
                    entry = LokrLayer(module, target.factor)
                else:
                    settings = {
                        "lora_dim": parameters.dim,
                        "alpha": parameters.alpha,
                        "factor": target.factor,
                        "full_matrix": True,
                    }
                    entry = LokrModule(
                        target.lora, module, **settings, bypass_mode=False, weight_decompose=parameters.dora
                    )
                entry.lokr_w1.data = init_weight(tuple(entry.lokr_w1.shape), parameters.seed, target.lora)
            self.entries[target.lora] = entry
        self.entries = dict(sorted(self.entries.items()))
        for name, entry in self.entries.items():
            entry.apply_to()
            self.add_module(name, entry)
        self.to(dtype)
        last = models["te1"].config.num_hidden_layers - 1
        self.idle = {name for name in self.entries if name.startswith(f"lora_te1_text_model_encoder_layers_{last}_")}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(tensor name, weight), sorted: all weights that a gradient reaches (text encoder 1's last layer is never on
        the way).
        """
        return [
            (f"{name}.{suffix}", weight)
            for name, entry in self.entries.items()
            if name not in self.idle
            for suffix, weight in sorted(entry.named_parameters())
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the LoKr file but .alpha, by its name in the file."""
        return {
            f"{name}.{suffix}": weight.data
            for name, entry in self.entries.items()
            for suffix, weight in sorted(entry.named_parameters())
        }
