"""The LoKr: its layer, computed from the factors, and the adapter that puts it on SDXL's U-Net and text encoders.

A layer with a LoKr computes W·x + kron(w1, w2)·x, and neither forward nor backward builds ΔW = kron(w1, w2).
w1 is (a, c), w2 is (b, d[, k, k]). The layer's c·d inputs are c groups of d, its a·b outputs a groups of b. For each
token or position

    v_ad = Σ_c w1_ac x_cd          small
    y_ab = Σ_d v_ad w2_bd          1/c of the multiplications of W·x
    s_ad = Σ_b g_ab w2_bd,  dx_cd = Σ_a w1_ac s_ad,  dw1_ac = Σ s_ad x_cd,  dw2_bd = Σ g_ab v_ad

The backward computes v again, so that only x is kept for it. LyCORIS has two other forms: the default adds ΔW to W,
subtracts W again and multiplies by the difference, which in fp16 rounds ΔW to W's grid; its bypass form applies w2,
then w1. benchmarks/step_timing.py compares all three.

`lokr.forward` selects the form: `factors` is LokrLayer; `delta` is LyCORIS's default, which DoRA needs. Which layers
carry a LoKr, under which name and with which factor, is decided by weights/lokr_preset.py: LyCORIS's own preset matches
diffusers' class and path names, which have changed since the release.
"""

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from kohaku_delta.formats.safetensors_io import SafetensorsFile
from kohaku_delta.params import Lokr
from kohaku_delta.weights import lokr_format, lokr_preset


class LokrFunction(torch.autograd.Function):
    """base + kron(w1, w2)·x, in the dtype of its arguments.

    Linear (options None): base (N·a, b), x (N, c, d). Convolution (options: stride, padding, dilation):
    base (N, a·b, H', W'), x (N, c, d, H, W).
    """

    @staticmethod
    def forward(ctx, base, x, w1, w2, options):
        ctx.save_for_backward(x, w1, w2)
        ctx.options = options
        v = torch.einsum("ac,nc...->na...", w1, x).flatten(0, 1)
        if options is None:
            return torch.addmm(base, v, w2.T)
        return base + F.conv2d(v, w2, None, *options).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w1, w2 = ctx.saved_tensors
        v = torch.einsum("ac,nc...->na...", w1, x).flatten(0, 1)
        grouped = g.reshape(-1, len(w2), *g.shape[2:])  # (N·a, b[, H', W'])
        if ctx.options is None:
            s, dw2 = grouped @ w2, grouped.T @ v
        else:
            s, dw2 = conv2d_input(v.shape, w2, grouped, *ctx.options), conv2d_weight(v, w2.shape, grouped, *ctx.options)
        s = s.view(len(x), len(w1), *x.shape[2:])
        dw1 = torch.einsum("nad,ncd->ac", s.flatten(2), x.flatten(2))
        dx = torch.einsum("ac,na...->nc...", w1, s) if ctx.needs_input_grad[1] else None
        return g, dx, dw1, dw2, None


class LokrLayer(nn.Module):
    """The LoKr of a linear layer or convolution, with two full matrices: lokr_w1 (a, c), lokr_w2 (b, d[, k, k]).

    w2 starts as 0; the caller fills w1.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, factor: int):
        super().__init__()
        from lycoris.functional import factorization

        out_features, in_features, *kernel = layer.weight.shape
        (a, b), (c, d) = factorization(out_features, factor), factorization(in_features, factor)
        self.lokr_w1 = nn.Parameter(torch.empty(a, c))
        self.lokr_w2 = nn.Parameter(torch.zeros(b, d, *kernel))
        self.options = (layer.stride, layer.padding, layer.dilation) if kernel else None
        self.layer: list[Any] = [layer]  # in a list: the layer's weights are not parameters of this module
        self.original_forward = layer.forward

    def apply_to(self) -> None:
        """Replace the layer's forward (LyCORIS's name for this step)."""
        self.layer[0].forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output plus kron(w1, w2)·x, in the dtype of the layer's output. x: as the layer takes it."""
        base = self.original_forward(x)
        # autocast decides the layer's dtype, and with it the LoKr's
        w1, w2, x = self.lokr_w1.to(base.dtype), self.lokr_w2.to(base.dtype), x.to(base.dtype)
        (c, d), b = (w1.shape[1], w2.shape[1]), len(w2)
        if self.options is None:
            return LokrFunction.apply(base.reshape(-1, b), x.reshape(-1, c, d), w1, w2, None).view(base.shape)
        return LokrFunction.apply(base, x.unflatten(1, (c, d)), w1, w2, self.options)


def init_weight(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """kaiming_uniform(a = √5) of a 2-d weight: uniform in ±1/√fan_in, float32; decided by (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    # numpy rounds a pair with a number from 2^63 on to float64: every second name's key has 53 bits, and all differ
    uniform = np.random.Generator(np.random.Philox(key=[seed, key])).random(shape)
    return torch.from_numpy(((2 * uniform - 1) / np.sqrt(shape[1])).astype(np.float32))


class LokrAdapter(nn.Module):
    """All LoKr and norm entries of the preset on the U-Net and both text encoders.

    `entries`: name in the LoKr file → LokrLayer, LokrModule or NormModule, sorted by name. Raises UserError for a
    preset target that matches no layer, and for a dim that would not give full matrices.
    """

    def __init__(self, models: dict[str, Any], parameters: Lokr, dtype: torch.dtype):
        super().__init__()
        parts = {part: models[part] for part in ("te1", "te2", "unet")}
        entries = {
            target.lora: self._entry(models[target.part].get_submodule(target.path), target, parameters)
            for target in lokr_preset.lokr_targets(parts, parameters.preset)
        }
        self.entries = dict(sorted(entries.items()))
        for name, entry in self.entries.items():
            entry.apply_to()
            self.add_module(name, entry)
        lokr_preset.require_full_matrices(parameters.dim, {name: tuple(w.shape) for name, w in self.named_parameters()})
        self.to(dtype)
        # The U-Net reads text encoder 1's penultimate states, so its last layer never gets a gradient.
        last = models["te1"].config.num_hidden_layers - 1
        self.untrained = {
            name for name in self.entries if name.startswith(f"lora_te1_text_model_encoder_layers_{last}_")
        }

    @staticmethod
    def _entry(layer: Any, target: lokr_preset.LokrTarget, parameters: Lokr) -> Any:
        from lycoris.modules.lokr import LokrModule
        from lycoris.modules.norms import NormModule

        if target.algorithm == "norm":
            return NormModule(target.lora, layer)
        if parameters.forward == "factors":
            entry = LokrLayer(layer, target.factor)
        else:
            entry = LokrModule(
                target.lora,
                layer,
                lora_dim=parameters.dim,
                alpha=parameters.alpha,
                factor=target.factor,
                full_matrix=True,
                bypass_mode=False,
                weight_decompose=parameters.dora,
            )
        entry.lokr_w1.data = init_weight(tuple(entry.lokr_w1.shape), parameters.seed, target.lora)
        return entry

    def load(self, file: SafetensorsFile, alpha: int) -> None:
        """Begin with the weights of a LoKr file, as kohya's --network_weights does. Raises UserError for a file with
        other modules, factors or shapes, another alpha, or values that are not finite.
        """
        weights = self.tensors()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        for name, values in lokr_format.read_weights(file, shapes, alpha):
            weights[name].copy_(torch.from_numpy(values.copy()))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(tensor name, weight) of every weight that gets a gradient, sorted by name."""
        return [
            (f"{name}.{suffix}", weight)
            for name, entry in self.entries.items()
            if name not in self.untrained
            for suffix, weight in sorted(entry.named_parameters())
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the LoKr file except .alpha, by its name in the file."""
        return {
            f"{name}.{suffix}": weight.data
            for name, entry in self.entries.items()
            for suffix, weight in sorted(entry.named_parameters())
        }
