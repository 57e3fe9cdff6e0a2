"""A LoKr computed from its factors is kron(w1, w2)·x, with its gradients, and stores only its input."""

import pytest
import torch
from torch import nn

from kohaku_delta import numerics
from kohaku_delta.training.lokr import LokrLayer

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "linear without bias": (lambda: nn.Linear(16, 16, bias=False), (7, 16)),
    "convolution": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 6, 5)),
    "strided convolution": (lambda: nn.Conv2d(12, 12, 3, stride=2, padding=1), (2, 12, 7, 6)),
    "convolution of one pixel": (lambda: nn.Conv2d(4, 24, 1), (2, 4, 3, 3)),
}


def lokr_layer(kind: str, factor: int):
    numerics.enforce()
    torch.manual_seed(5)
    build, shape = LAYERS[kind]
    layer = build().double().requires_grad_(False)
    kron = LokrLayer(layer, factor).double()
    for weight in kron.parameters():
        weight.data = torch.randn(weight.shape, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return layer, kron, x


def explicit(layer, kron, x):
    """The layer with the weight W + kron(w1, w2)."""
    w1, w2 = kron.lokr_w1, kron.lokr_w2
    whole = torch.kron(w1.view(*w1.shape, *[1] * (w2.dim() - 2)), w2)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, layer.weight + whole, layer.bias)
    return nn.functional.conv2d(x, layer.weight + whole, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradients_are_those_of_the_whole_kronecker_product(kind, factor):
    layer, kron, x = lokr_layer(kind, factor)
    wanted = explicit(layer, kron, x)
    direction = torch.randn(wanted.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, (x, kron.lokr_w1, kron.lokr_w2), direction)
    kron.apply_to()
    found = layer(x)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, kron.lokr_w1, kron.lokr_w2), direction), gradients, strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_that_of_finite_differences(kind):
    layer, kron, x = lokr_layer(kind, 4)
    kron.apply_to()
    assert torch.autograd.gradcheck(lambda x, w1, w2: layer(x), (x, kron.lokr_w1, kron.lokr_w2))


def test_the_factors_have_the_shapes_of_lycoris():
    from lycoris.modules.lokr import LokrModule

    for build, _ in LAYERS.values():
        for factor in (2, 4, 8):
            layer = build()
            theirs = LokrModule("x", layer, lora_dim=10000, alpha=10000, factor=factor, full_matrix=True)
            ours = LokrLayer(layer, factor)
            assert ours.lokr_w1.shape == theirs.lokr_w1.shape and ours.lokr_w2.shape == theirs.lokr_w2.shape


def test_only_the_input_and_the_factors_are_stored_for_the_backward():
    layer, kron, x = lokr_layer("linear", 4)
    kron.apply_to()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: stored.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        layer(x)
    assert (
        max(stored) <= max(x.numel(), layer.weight.numel())
        and sum(stored) <= 2 * x.numel() + sum(weight.numel() for weight in kron.parameters()) + layer.weight.numel()
    )
