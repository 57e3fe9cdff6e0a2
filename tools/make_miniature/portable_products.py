"""Invariant: every matrix product here is OpenBLAS's with its Haswell kernels, on one thread: the same bits on every
x86-64 host with AVX2 and FMA.

The portable branch of torch's own library (SSE2) is three to six times slower, and training three models would take
hours with it. So for this process alone, convolutions, linear layers and attention go through numpy's OpenBLAS, whose
kernels a variable fixes, and their derivatives are written out here. `fix_openblas()` must run before numpy is imported.
"""

import math
import os

FIXED = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}


def fix_openblas() -> None:
    """Fixes OpenBLAS's kernels; call it first of all."""
    import sys

    if "numpy" in sys.modules and any(os.environ.get(key) != value for key, value in FIXED.items()):
        raise RuntimeError(
            "numpy was loaded before its OpenBLAS was fixed: call portable_products.fix_openblas() first"
        )
    os.environ.update(FIXED)


def replace_torch_functions() -> None:
    """From now on torch.nn.functional's conv2d, linear and scaled_dot_product_attention are the ones below, and
    diffusers' sinusoids those of portable_math.py.
    """
    import torch
    import torch.nn.functional as F

    torch.utils.deterministic.fill_uninitialized_memory = False
    Linear, Convolution, Attention = functions()

    def linear(x, weight, bias=None):
        y = Linear.apply(x, weight)
        return y if bias is None else y + bias

    def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        stride = stride[0] if isinstance(stride, tuple) else stride
        padding = padding[0] if isinstance(padding, tuple) else padding
        y = Convolution.apply(x, weight, stride, padding)
        return y if bias is None else y + bias[:, None, None]

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        if is_causal:
            places = torch.arange(query.shape[-2])
            attn_mask = places[:, None] >= places
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -1e30)
        return Attention.apply(query, key, value, attn_mask, scale)

    F.linear, F.conv2d, F.scaled_dot_product_attention = linear, conv2d, attention

    from diffusers.models import embeddings

    from make_miniature.portable_math import timestep_embedding

    embeddings.get_timestep_embedding = timestep_embedding


def functions():
    import numpy as np
    import torch
    import torch.nn.functional as F

    def product(a, b):
        return torch.from_numpy(np.matmul(a.detach().numpy(), b.detach().numpy()))

    class Linear(torch.autograd.Function):
        """y = x Wᵀ; x (…, I), W (O, I)."""

        @staticmethod
        def forward(context, x, weight):
            context.save_for_backward(x, weight)
            return product(x.reshape(-1, x.shape[-1]), weight.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(context, g):
            x, weight = context.saved_tensors
            flat = g.reshape(-1, g.shape[-1])
            gx = product(flat, weight).view(x.shape) if context.needs_input_grad[0] else None
            return gx, product(flat.T, x.reshape(-1, x.shape[-1]))

    def columns(x, size, stride, padding):
        """The patches of x (B, C, H, W) as (B, C · size², h · w), with h and w."""
        if padding:
            x = F.pad(x, (padding,) * 4)
        x = x.contiguous()
        height, width = ((side - size) // stride + 1 for side in x.shape[2:])
        if size == 1 and stride == 1:
            return x.view(*x.shape[:2], -1), height, width
        by_image, by_channel, by_row, _ = x.stride()
        view = x.as_strided(
            (*x.shape[:2], size, size, height, width), (by_image, by_channel, by_row, 1, stride * by_row, stride)
        )
        return view.contiguous().view(len(x), -1, height * width), height, width

    class Convolution(torch.autograd.Function):
        """Columns of patches, then one product an image; x (B, C, H, W), weight (O, C, k, k)."""

        @staticmethod
        def forward(context, x, weight, stride, padding):
            patches, height, width = columns(x, weight.shape[-1], stride, padding)
            context.save_for_backward(patches, weight)
            context.geometry = x.shape, stride, padding
            return product(weight.reshape(len(weight), -1), patches).view(len(x), -1, height, width)

        @staticmethod
        def backward(context, g):
            patches, weight = context.saved_tensors
            (count, _, height, width), stride, padding = context.geometry
            size = weight.shape[-1]
            gweight = torch.zeros(len(weight), weight[0].numel(), dtype=g.dtype)
            for each in product(
                g.reshape(*g.shape[:2], -1), patches.transpose(1, 2)
            ):  # added image by image: a fixed order
                gweight += each
            gweight = gweight.view(weight.shape)
            if not context.needs_input_grad[0]:
                return None, gweight, None, None
            if stride > 1:  # zeros between the gradients make it a convolution of stride 1
                spread = torch.zeros(
                    *g.shape[:2], height + 2 * padding - size + 1, width + 2 * padding - size + 1, dtype=g.dtype
                )
                spread[:, :, ::stride, ::stride] = g
                g = spread
            turned = weight.flip(2, 3).transpose(0, 1).reshape(weight.shape[1], -1)
            patches, _, _ = columns(g, size, 1, size - 1 - padding)
            return product(turned, patches).view(count, -1, height, width), gweight, None, None

    class Attention(torch.autograd.Function):
        """softmax(Q Kᵀ s + mask) V; (B, heads, L, d) each."""

        @staticmethod
        def forward(context, query, key, value, mask, scale):
            scores = product(query, key.transpose(-1, -2)) * scale
            part = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            context.save_for_backward(query, key, value, part)
            context.scale = scale
            return product(part, value)

        @staticmethod
        def backward(context, g):
            query, key, value, part = context.saved_tensors
            gpart = product(g, value.transpose(-1, -2))
            gscores = torch._softmax_backward_data(gpart, part, -1, part.dtype) * context.scale
            return (
                product(gscores, key),
                product(gscores.transpose(-1, -2), query),
                product(part.transpose(-1, -2), g),
                None,
                None,
            )

    return Linear, Convolution, Attention
