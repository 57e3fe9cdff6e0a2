"""The GPU memory of a full-size step, planned without computing a number: every tensor is a shape and a count of
bytes, alive as long as the real one would be.

The step is the loop's own (training/training_loop.py) on torch's fake tensors: the release's preset, batch, precision
and checkpointing, one micro-batch in each lane of one of some cards. torch's CPU build has no fake card, so the
operators are the CPU's, except that norms give float32 as with CUDA's autocast. Attention uses its flash form, which
never stores the scores, like the card's memory-efficient one, the VAE's in float32 too. Not included: workspaces of
kernels, fragmentation of the allocator, and CUDA's own 0.5 GiB or so.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import synthetic_checkpoints
from kohaku_delta.params import Recipe
from kohaku_delta.sdxl import model_loading
from kohaku_delta.training import gradient_reduction, optimizer
from kohaku_delta.training.batch_builder import Batch
from kohaku_delta.training.lokr import LokrAdapter
from kohaku_delta.training.sdxl_model import Sdxl
from kohaku_delta.training.training_context import TrainingContext
from kohaku_delta.training.training_loop import TrainingLoop

CHUNK = 75  # tokens


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive: `now`, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


def to_fake_tensors(module: nn.Module) -> None:
    """Gives every weight and buffer a fake tensor of its shape (Module.to_empty cannot swap fake tensors)."""
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    held[name] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )


class Planned(Sdxl):
    """An SDXL whose latents are not looked at: a fake number can be neither finite nor infinite."""

    def latents(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.latent(*each) for each in zip(pixels, noise, strict=True)]).to(self.precision)


def models(
    recipe: Recipe, configs: dict[str, dict], device: str, fill: Callable[[nn.Module], None], kind: type[Sdxl] = Sdxl
) -> tuple[Sdxl, LokrAdapter]:
    """An SDXL of these configurations on `device`, and the recipe's adapter, which is not moved there. `fill` gives a
    module its tensors in place of its shapes.
    """
    precision = getattr(torch, recipe.train.precision)
    with torch.device("meta"):
        made = model_loading.build(configs)
    for name, module in made.items():
        module.to(torch.float32 if name == "vae" else precision)
        module.requires_grad_(False)
    adapter = LokrAdapter(made, recipe.lokr, getattr(torch, recipe.train.weights))
    for module in made.values():
        fill(module)
    model = kind(
        made,
        configs["te2"]["eos_token_id"],
        recipe.model.vae_scaling_factor,
        recipe.train.min_snr_gamma,
        device,
        precision,
    )
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model, adapter


def batch(count: int, side: int, tokens: int) -> Batch:
    """A micro-batch of grey pictures and empty captions."""
    ids = torch.zeros((count, tokens // CHUNK, CHUNK + 2), dtype=torch.int64)
    noise = torch.zeros(count, 4, side // 8, side // 8)
    pixels = torch.zeros((count, 3, side, side), dtype=torch.uint8)
    return Batch(pixels, ids, ids, torch.zeros(count, 6), noise, noise, torch.zeros(count, dtype=torch.int64))


def norm_of_cuda(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The norm in float32 with a float32 output, as CUDA's autocast computes it; the CPU's stays in fp16."""

    def compute(x: torch.Tensor, *arguments, **named) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return norm(x, *arguments, **named)
        cast = partial(tree_map_only, torch.Tensor, torch.Tensor.float)
        return norm(x.float(), *cast(arguments), **cast(named))

    return compute


def gather_copies(gathered: torch.Tensor, part: torch.Tensor) -> None:
    """Takes the place of the collective, which allocates nothing: both buffers are the caller's."""
    for buffer in gathered.chunk(len(gathered) // len(part)):
        buffer.copy_(part)


def peak_bytes(recipe: Recipe, schedule, ranks: int) -> dict[str, int]:
    """Bytes at the peak of each phase of a step of one of `ranks` cards: `weights` (always in use), `lanes` (forward
    and backward of a micro-batch in each lane), `reduction` (gather, sum and norm), `update`.

    `schedule`: any, for the loop; its rows are not read.
    """
    with ExitStack() as stack:
        stack.callback(torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled())
        torch.backends.cuda.enable_flash_sdp(True)
        fakes, live = FakeTensorMode(allow_non_fake_inputs=True), Live()

        def fill(module: nn.Module) -> None:
            with fakes, live:
                to_fake_tensors(module)

        for name in ("group_norm", "layer_norm"):
            patch = mock.patch.object(torch.nn.functional, name, norm_of_cuda(getattr(torch.nn.functional, name)))
            stack.enter_context(patch)
        model, adapter = models(recipe, synthetic_checkpoints.configs(1.0), "cpu", fill, Planned)
        fill(adapter)
        stack.enter_context(fakes)
        stack.enter_context(live)
        stack.enter_context(mock.patch("torch.distributed.all_gather_single", gather_copies))
        with mock.patch("kohaku_delta.training.optimizer.Lion"):  # it makes tables of numbers
            loop = TrainingLoop(recipe, TrainingContext(model, adapter, None, schedule, {}), None, 0, ranks)
        state = [torch.empty(weight.numel(), dtype=torch.uint8) for _, weight in loop.trained]  # the optimizer's
        peaks = {"weights": live.now}

        def phase(name: str) -> None:
            peaks[name], live.peak = live.peak, live.now

        micro_batch = batch(recipe.schedule.batch_size, recipe.model.side, recipe.train.max_token_length)
        tree = gradient_reduction.PairwiseSum()
        for _ in loop.lanes[1:]:  # of the other lanes only their sums are left when the last one runs
            tree.add(torch.empty(sum(weight.numel() for _, weight in loop.trained)))
        tree.add(loop.lane_gradient(1, iter([micro_batch]), 1, []))
        phase("lanes")
        gradient = gradient_reduction.all_reduce_tree(tree.sum(), ranks)
        for part in gradient.split(optimizer.PIECE):
            part.double()
        phase("reduction")
        for _, weight in loop.trained:
            weight.grad = torch.empty_like(weight)
        phase("update")
        del state
        return peaks
