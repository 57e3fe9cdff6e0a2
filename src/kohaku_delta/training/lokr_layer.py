"""Invariant: a layer with a LoKr gives W·x + kron(w1, w2)·x, and neither forward nor backward builds ΔW = kron(w1, w2).

w1 is (a, c), w2 is (b, d[, k, k]). A layer's c·d inputs are c groups of d, its a·b outputs a groups of b; for each
token or position

    v_ad = Σ_c w1_ac x_cd          small
    y_ab = Σ_d v_ad w2_bd          1/c of the layer's own product
    s_ad = Σ_b g_ab w2_bd,  dx_cd = Σ_a w1_ac s_ad,  dw1_ac = Σ s_ad x_cd,  dw2_bd = Σ g_ab v_ad

v is computed again in the backward, so that x alone is kept for it. LyCORIS's own forms: the default adds ΔW to W,
takes W off again and multiplies by the rest, which in fp16 rounds ΔW to W's grid; its bypass form applies w2, then w1.
benchmarks/train.py compares all three.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight


class LokrFunction(torch.autograd.Function):
    """base + kron(w1, w2)·x. Linear (options None): base (N·a, b), x (N, c, d). Convolution with (stride, padding,
    dilation): base (N, a·b, H', W'), x (N, c, d, H, W).
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
    """The LoKr of a linear layer or a convolution, both halves whole. w2 is 0, w1 is for the caller to fill."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, factor: int):
        super().__init__()
        from lycoris.functional import factorization

        out, inner, *kernel = layer.weight.shape
        (a, b), (c, d) = factorization(out, factor), factorization(inner, factor)
        self.lokr_w1 = nn.Parameter(torch.empty(a, c))
        self.lokr_w2 = nn.Parameter(torch.zeros(b, d, *kernel))
        self.options = (layer.stride, layer.padding, layer.dilation) if kernel else None
        self.layer, self.own = [layer], layer.forward  # in a list: its weights are not this module's

    def apply_to(self) -> None:
        self.layer[0].forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.own(x)
        w1, w2, x = (
            each.to(base.dtype) for each in (self.lokr_w1, self.lokr_w2, x)
        )  # autocast decides the layer's dtype, and with it this one
        (c, d), b = (w1.shape[1], w2.shape[1]), len(w2)
        if self.options is None:
            return LokrFunction.apply(base.reshape(-1, b), x.reshape(-1, c, d), w1, w2, None).view(base.shape)
        return LokrFunction.apply(base, x.unflatten(1, (c, d)), w1, w2, self.options)
