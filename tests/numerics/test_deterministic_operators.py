"""No operator of a step, of the VAE or of the sampler is one that torch refuses on CUDA in its deterministic mode.

The list is torch's own, read from the documentation of the installed `torch.use_deterministic_algorithms`; a version
that names other operators fails the first test, so that the table below is looked at again.
"""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_check
import tiny_release
import tiny_sdxl
from kohaku_delta import numerics
from kohaku_delta.preview import sampler
from kohaku_delta.training import conditioning

# What the documentation names → the operators that it means: their names without overload begin so.
REFUSED = {
    "AvgPool3d": ("avg_pool3d_backward",),
    "AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "MaxUnpool1d": ("max_unpool",),
    "MaxUnpool2d": ("max_unpool",),
    "MaxUnpool3d": ("max_unpool",),
    "functional.interpolate": tuple(
        f"{name}_backward"
        for mode in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
        for name in (f"upsample_{mode}", f"_upsample_{mode}_aa")
    ),
    "ReflectionPad1d": ("reflection_pad1d_backward",),
    "ReflectionPad2d": ("reflection_pad2d_backward",),
    "ReflectionPad3d": ("reflection_pad3d_backward",),
    "NLLLoss": ("nll_loss",),
    "CTCLoss": ("_ctc_loss_backward",),
    "EmbeddingBag": ("_embedding_bag",),
    "Tensor.put_": ("put",),
    "histc": ("histc",),
    "bincount": ("bincount",),
    "median": ("median", "nanmedian"),
    "functional.grid_sample": ("grid_sampler",),
    "cumsum": ("cumsum",),  # of floating-point numbers
    "Tensor.scatter_reduce": ("scatter_reduce",),
    "Tensor.resize_": ("_resize_output_quantized",),
}
# Refused by the source (alertNotDeterministic) and not named by the documentation.
REFUSED_SILENTLY = ("index_reduce", "kthvalue", "_segment_reduce_backward", "segment_reduce", "_histogramdd")


class Operators(TorchDispatchMode):
    """Collects the operators, with the kind of their first tensor."""

    def __init__(self):
        super().__init__()
        self.found: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        floating = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
        self.found.add((str(function).split(".")[1], floating))
        return function(*args, **(kwargs or {}))

    def refused(self) -> set[str]:
        beginnings = tuple(name for names in REFUSED.values() for name in names) + REFUSED_SILENTLY
        return {
            name for name, floating in self.found if name.startswith(beginnings) and (floating or "cumsum" not in name)
        }


def test_the_table_has_what_the_installed_torchs_documentation_refuses():
    text = torch.use_deterministic_algorithms.__doc__.split("when ``mode=True``:")[2].split("In addition")[0]
    named = set(re.findall(r"\* :(?:class|func):`torch\.(?:nn\.)?([\w.]+)`", text))
    assert named == set(REFUSED)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.cumsum(0),
        lambda x: torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward(),
        lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 3).sum().backward(),
        lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect").sum().backward(),
        lambda x: x.flatten().median(0),
    ],
)
def test_an_operator_that_torch_would_refuse_is_found(compute):
    with Operators() as operators:
        compute(torch.rand(1, 1, 8, 8, requires_grad=True))
    assert operators.refused()


@pytest.mark.parametrize("form", ["factors", "delta"])
def test_no_operator_of_a_step_is_refused_on_a_card(form, tmp_path):
    """A whole step with the release's precision, preset, checkpoints and optimizer; `delta` is LyCORIS's layer. What a
    card does otherwise: its attention is one operator, deterministic in strict mode, and autocast's norms are float32.
    """
    numerics.enforce()
    recipe = tiny_release.recipe()
    with Operators() as operators:
        context = gpu_check.drawn_context(recipe, tiny_sdxl.CONFIGS, "cpu", form)
        loop = gpu_check.RecordingLoop(recipe, context, tmp_path)
        gpu_check.run_step(loop, 0, tiny_sdxl.CONFIGS["te2"]["vocab_size"])
    names = {name for name, _ in operators.found}
    assert {"convolution_backward", "native_group_norm_backward", "upsample_nearest2d_backward"} <= names
    assert operators.refused() == set()


def test_no_operator_of_the_sampler_is_refused_on_a_card(monkeypatch):
    numerics.enforce()
    recipe = tiny_release.recipe()
    ids = torch.zeros(2, 1, 77, dtype=torch.int64)
    monkeypatch.setattr(conditioning, "token_ids", lambda *_: (ids, ids))
    preview = recipe.preview.model_copy(update={"steps": 2, "prompts": ["circle"], "width": 64, "height": 64})
    with Operators() as operators:
        context = gpu_check.drawn_context(recipe, tiny_sdxl.CONFIGS, "cpu")
        sampler.sample_images(context.model, (None, None), preview, 8, 75)
    assert "convolution" in {name for name, _ in operators.found} and operators.refused() == set()
