"""The operators that training, VAE and sampler may run on the CPU: each gives the same bits on every x86-64 processor
with AVX2.

An operator is EXACT (it moves numbers, or IEEE 754 defines each result's bits) or MEASURED: its digest on fixed inputs
is in operators.json and was equal on real and emulated processors of several vendors. tests/numerics/test_operators.py
fails for any other operator. `kohaku-delta operators` prints the digests of this processor; docs/processors.md says
what they prove.
"""

import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

KNOWN = Path(__file__).with_name("operators.json")

# aten operators whose result is defined by IEEE 754 or involves no arithmetic: copies, views, comparisons, integers,
# conversions (rounded once), and elementwise + − × ÷. `pow` only with the exponents 1 and 2, which torch computes by
# copying and multiplying.
EXACT = frozenset(
    """
    __rshift__ _local_scalar_dense _to_copy _unsafe_view abs add add_ alias all arange argmax bitwise_xor_ cat clamp
    clone constant_pad_nd copy_ detach div div_ embedding empty eq expand fill_ full index index_put lift_fresh
    masked_fill_ mul mul_ ne neg new_empty new_zeros ones ones_like permute pow round rsub scalar_tensor select
    select_backward slice slice_backward split squeeze stack sub t transpose tril unbind unsqueeze upsample_nearest2d
    view where zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)
# Random numbers that are overwritten before they are read: initial weights of modules, the DataLoader's base seed.
OVERWRITTEN = frozenset(("uniform_", "normal_", "random_"))


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Float32 in ±scale, made from integers: equal everywhere by construction."""
    integers = np.random.Generator(np.random.Philox(key=[seed, sum(shape)])).integers(-(2**20), 2**20, shape)
    return torch.from_numpy((integers * (scale / 2**20)).astype(np.float32))


def gradients(function: Callable, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function and the gradients of its inputs, for a fixed gradient of the result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return [result, *torch.autograd.grad(result, leaves, numbers(*result.shape, seed=9).to(result.dtype))]


def both_precisions(function: Callable, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """`gradients` in float32 and in float16."""
    return gradients(function, *inputs) + gradients(function, *(tensor.half() for tensor in inputs))


def matrix_products() -> list[torch.Tensor]:
    """Sizes of the miniature's layers and odd sizes, some transposed, some with a bias."""
    results = []
    for rows, inner, columns in (
        (1, 48, 48),
        (227, 112, 48),
        (256, 48, 192),
        (77, 64, 64),
        (3, 5, 7),
        (129, 65, 33),
        (64, 2048, 24),
    ):
        left, right, bias = numbers(rows, inner), numbers(inner, columns, seed=1), numbers(columns, seed=2)
        results += [
            left @ right,
            left.T.contiguous().T @ right,
            torch.addmm(bias, left, numbers(columns, inner, seed=3).T),
        ]
        results += [left.half() @ right.half(), torch.addmm(bias.half(), left.half(), right.half())]
    return results


def batched_products() -> list[torch.Tensor]:
    shapes = ((6, 77, 16, 77), (3, 256, 16, 227), (2, 64, 3, 5), (8, 6, 8, 1024))
    return [
        torch.bmm(numbers(b, m, k).to(dtype), numbers(b, k, n, seed=1).to(dtype))
        for dtype in (torch.float32, torch.float16)
        for b, m, k, n in shapes
    ]


def convolutions() -> list[torch.Tensor]:
    results = []
    for channels, out, side, kernel, stride in (
        (4, 24, 16, 3, 1),
        (24, 48, 16, 3, 1),
        (48, 48, 9, 3, 2),
        (24, 48, 8, 1, 1),
        (3, 8, 32, 3, 1),
        (6, 6, 7, 3, 1),
    ):
        convolution = partial(F.conv2d, stride=stride, padding=kernel // 2)
        results += both_precisions(
            convolution,
            numbers(2, channels, side, side + 1),
            numbers(out, channels, kernel, kernel, seed=1, scale=0.1),
            numbers(out, seed=2),
        )
    return results


def attention() -> list[torch.Tensor]:
    """The math form, with and without the causal mask of the text encoders."""
    query_key_value = [numbers(2, 3, 77, 16, seed=seed, scale=4.0) for seed in range(3)]
    return [
        result
        for causal in (False, True)
        for result in both_precisions(partial(F.scaled_dot_product_attention, is_causal=causal), *query_key_value)
    ]


def group_norm() -> list[torch.Tensor]:
    shapes = ((2, 24, 16, 16), (1, 48, 7, 5), (3, 8, 33, 1))
    return [
        result
        for shape in shapes
        for result in both_precisions(
            lambda x, w, b: F.group_norm(x, 4, w, b),
            numbers(*shape),
            numbers(shape[1], seed=1),
            numbers(shape[1], seed=2),
        )
    ]


def layer_norm() -> list[torch.Tensor]:
    shapes = ((2, 77, 48), (5, 3, 64), (1, 9, 1280))
    return [
        result
        for shape in shapes
        for result in both_precisions(
            lambda x, w, b: F.layer_norm(x, w.shape, w, b),
            numbers(*shape),
            numbers(shape[-1], seed=1),
            numbers(shape[-1], seed=2),
        )
    ]


def pointwise(function: Callable, low: float, high: float) -> Callable[[], list[torch.Tensor]]:
    """An elementwise function over a range, with its gradient; 4,099 numbers, so that no vector width divides them."""
    return lambda: both_precisions(function, numbers(4099) * ((high - low) / 2) + (high + low) / 2)


def sums() -> list[torch.Tensor]:
    singles = [numbers(3, 24, 16, 16), numbers(5, 1031), numbers(227, 2048).T]
    inputs = [*singles, *(tensor.half() for tensor in singles)]
    return [*(tensor.sum(dim=dim) for tensor in inputs for dim in (0, -1, (0, -1))), numbers(1_000_003).sum()]


def means() -> list[torch.Tensor]:
    return [
        numbers(4, 4, 16, 12).square().mean(dim=(1, 2, 3)),
        numbers(7).mean(),
        numbers(100_003).mean(),
        F.avg_pool2d(numbers(2, 3, 16, 16), 8),
    ]


def norms() -> list[torch.Tensor]:
    return [
        torch.linalg.vector_norm(numbers(1_000_003), dtype=torch.float64),
        torch.linalg.vector_norm(numbers(48, 31), dim=1),
        torch.linalg.vector_norm(numbers(8, 3, 9), dim=(1, 2)),
    ]


def schedules() -> list[torch.Tensor]:
    return [torch.linspace(0.00085**0.5, 0.012**0.5, 1000), torch.cumprod(1 - numbers(1000).abs() / 50, dim=0)]


def optimizers() -> list[torch.Tensor]:
    """Three updates of Lion8bit; one weight keeps its momentum in 8 bits, one in float32."""
    import bitsandbytes

    results = []
    for dtype in (torch.float32, torch.float16):
        weights = [
            torch.nn.Parameter(numbers(96, 96, seed=seed).to(dtype)[: 96 - 90 * seed].contiguous()) for seed in (0, 1)
        ]
        lion = bitsandbytes.optim.Lion8bit(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(3):
            for weight in weights:
                weight.grad = numbers(*weight.shape, seed=step + 5, scale=1e-3).to(dtype)
            lion.step()
        results += [weight.detach() for weight in weights] + [
            lion.state[weight][key] for weight in weights for key in ("state1", "absmax1") if key in lion.state[weight]
        ]
    return results


def random_numbers() -> list[np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=[1337, 1]))
    return [generator.standard_normal(200_000), generator.random(1000), generator.integers(0, 1000, 1000)]


def square_roots() -> list[np.ndarray]:
    single = numbers(4099).abs().numpy()
    return [np.sqrt(single), np.sqrt(single.astype(np.float64)), np.sqrt(single.astype(np.float16))]


def picture(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): gradients with noise."""
    slopes = np.add.outer(np.arange(height) * 2, np.arange(width))[..., None] + np.array([0, 60, 120])
    noise = np.random.Generator(np.random.Philox(key=[3, 3])).integers(0, 40, (height, width, 3))
    return ((slopes + noise) % 256).astype(np.uint8)


def resized_pictures() -> list[np.ndarray]:
    import cv2

    cv2.setNumThreads(1)
    sizes = ((96, 128), (97, 131), (40, 40), (300, 211))
    return [
        cv2.resize(picture(*source), target[::-1], interpolation=cv2.INTER_AREA)
        for source in ((200, 161), (320, 320), (64, 90))
        for target in sizes
    ]


def blurred_pictures_in_lab() -> list[np.ndarray]:
    """What the preview measures distances in: OpenCV's integer arithmetic."""
    import cv2

    blurred = [
        cv2.GaussianBlur(picture(*size), (13, 13), 2.0, borderType=cv2.BORDER_REPLICATE)
        for size in ((128, 128), (67, 101))
    ]
    return [*blurred, *(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB) for pixels in blurred)]


def coded_pictures() -> list[np.ndarray]:
    """The decoded pixels of each format, and the bytes of the PNG file."""
    from PIL import Image

    pictures = []
    for form, options in (("WEBP", {"quality": 90}), ("JPEG", {"quality": 90}), ("PNG", {})):
        file = io.BytesIO()
        Image.fromarray(picture(67, 101)).save(file, form, **options)
        pictures.append(np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB")))
    return [*pictures, np.frombuffer(file.getvalue(), np.uint8)]


# name → the aten (or bitsandbytes) operators that it covers, and the function that runs them
MEASURED: dict[str, tuple[tuple[str, ...], Callable[[], list]]] = {
    "matrix products": (("mm", "addmm"), matrix_products),
    "batched matrix products": (("bmm",), batched_products),
    "convolutions": (("convolution", "convolution_backward"), convolutions),
    "softmax": (("_safe_softmax", "_softmax_backward_data"), attention),
    "group norm": (("native_group_norm", "native_group_norm_backward"), group_norm),
    "layer norm": (("native_layer_norm", "native_layer_norm_backward"), layer_norm),
    "GELU": (("gelu", "gelu_backward"), pointwise(F.gelu, -8, 8)),
    "SiLU": (("silu", "silu_backward"), pointwise(F.silu, -20, 20)),
    "sigmoid": (("sigmoid", "sigmoid_backward"), pointwise(torch.sigmoid, -20, 20)),
    "exp": (("exp",), pointwise(torch.exp, -80, 8)),
    "sine and cosine": (
        ("sin", "cos"),
        lambda: pointwise(torch.sin, -4097, 4097)() + pointwise(torch.cos, -4097, 4097)(),
    ),
    "sums": (
        ("sum", "upsample_nearest2d_backward"),
        lambda: sums() + gradients(lambda x: F.interpolate(x, scale_factor=2.0), numbers(2, 4, 9, 8)),
    ),
    "means": (("mean",), means),
    "norms": (("linalg_vector_norm",), norms),
    "noise schedule": (("linspace", "cumprod"), schedules),
    "Lion8bit": (("optimizer_update_8bit_blockwise", "optimizer_update_32bit"), optimizers),
    "numpy: random numbers": ((), random_numbers),
    "numpy: square roots": ((), square_roots),
    "OpenCV: INTER_AREA": ((), resized_pictures),
    "OpenCV: blur, Lab": ((), blurred_pictures_in_lab),
    "Pillow: WebP, JPEG, PNG": ((), coded_pictures),
}


def torch_square_roots() -> list[torch.Tensor]:
    """No training runs this: if its digest differs between two processors, MKL's vector functions do."""
    return [numbers(100_003).abs().sqrt(), numbers(100_003).abs().double().sqrt()]


def digest(results: list) -> str:
    """The first 16 hex digits of the sha256 of the tensors' and arrays' bytes."""
    arrays = [result.detach().numpy() if isinstance(result, torch.Tensor) else result for result in results]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def digests() -> dict[str, str]:
    """The digest of every measured operator on this processor, after `numerics.enforce("cpu")`."""
    return {name: digest(function()) for name, (_, function) in MEASURED.items()}


def known() -> dict[str, str]:
    """The committed digests, which every processor should give."""
    return json.loads(KNOWN.read_text(encoding="utf-8"))


def is_known(operator: str, arguments: tuple) -> bool:
    """Whether an operator (`aten.pow.Tensor_Scalar`, as torch names it) is exact, measured or overwritten."""
    name = operator.split(".")[1]
    if name == "pow":
        return arguments[1] in (1, 2)
    measured = {covered for operators, _ in MEASURED.values() for covered in operators}
    return name in EXACT or name in OVERWRITTEN or name in measured
