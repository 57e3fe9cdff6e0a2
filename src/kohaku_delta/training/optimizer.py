"""One optimizer update from one summed gradient: unscale, clip, set the learning rates, Lion8bit. Equal on every rank.

Lion (Chen et al. 2023), learning rate η, weight decay λ, gradient g, momentum m:

    c ← β₁·m + (1 − β₁)·g
    w ← w·(1 − η·λ) − η·sign(c)
    m ← β₂·m + (1 − β₂)·g

bitsandbytes keeps m in 8 bits, in blocks of 256 numbers; tensors under 4,096 elements keep it in float32.
"""

from importlib.metadata import version
from math import hypot, isfinite

import torch

from kohaku_delta.errors import UserError
from kohaku_delta.params import Train
from kohaku_delta.training import bitsandbytes_versions, divergence

STATE_KEYS = ("absmax1", "state1")
PIECE = 1 << 24  # numbers whose norm is computed at a time: a float64 copy of 128 MiB


def check_bitsandbytes(installed: str) -> None:
    """Raises UserError for bitsandbytes 0.36.0 to 0.41.0."""
    if bitsandbytes_versions.is_broken(installed):
        raise UserError(
            f"bitsandbytes {installed} is installed; the 8-bit optimizers of 0.36.0 to 0.41.0 are broken. "
            "Install the locked version: `make repro` does."
        )


def learning_rate(updates: int, base: float, warmup_steps: int) -> float:
    """Constant after a linear warm-up that starts at 0. `updates`: number of updates already made."""
    return base * min(1.0, updates / warmup_steps) if warmup_steps else base


def norm(gradient: torch.Tensor) -> float:
    """The Euclidean norm of a flat gradient in float64, computed piece by piece in a fixed order."""
    return hypot(*(torch.linalg.vector_norm(part, dtype=torch.float64).item() for part in gradient.split(PIECE)))


class LossScaler:
    """Dynamic loss scaling for fp16, with the defaults of torch's GradScaler, until divergence.py's limits.

    GradScaler refuses fp16 gradients (the release's trainer patched the check away), and never gives up.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, enabled: bool):
        self.scale, self.good_steps = (65536.0, 0) if enabled else (1.0, 0)
        self.enabled = enabled
        self.overflows = 0  # steps in a row that overflowed, up to now

    def update(self, finite: bool) -> None:
        """Adapt the scale to a step's gradient. Raises UserError if it collapsed; nothing is changed then."""
        if not self.enabled:
            return
        if not finite:
            if self.overflows + 1 >= divergence.LONGEST_OVERFLOW or self.scale * self.BACKOFF < divergence.LOWEST_SCALE:
                raise UserError(
                    f"The loss scale collapsed: the gradient is not finite in {self.overflows + 1} steps in a row, in "
                    f"the last one with a scale of {self.scale:g}. A learning rate that is too high, or a base whose "
                    "values are too large for fp16, does this; the journal has every step's loss, gradient norm and "
                    "scale."
                )
            self.scale, self.good_steps = self.scale * self.BACKOFF, 0
            self.overflows += 1
            return
        self.overflows = 0
        if self.good_steps + 1 == self.INTERVAL:
            self.scale, self.good_steps = self.scale * self.GROWTH, 0
        else:
            self.good_steps += 1


class Lion:
    """Lion8bit over an adapter's trained weights, in two groups: U-Net and text encoders."""

    def __init__(self, trained: list[tuple[str, torch.nn.Parameter]], parameters: Train):
        check_bitsandbytes(version("bitsandbytes"))
        import bitsandbytes

        self.parameters = parameters
        self.trained = trained
        groups = [
            {"params": [weight for name, weight in trained if name.startswith(prefix)], "lr": 0.0}
            for prefix in ("lora_unet_", "lora_te")
        ]
        self.lion = bitsandbytes.optim.Lion8bit(
            groups, lr=0.0, betas=tuple(parameters.betas), weight_decay=parameters.weight_decay
        )

    def step(self, updates: int, gradient: torch.Tensor, scaler: LossScaler) -> tuple[float, float, float]:
        """Update the weights; returns (gradient norm before clipping, U-Net rate, text encoder rate).

        gradient: the flat scaled sum, float32, in the order of `trained`; changed in place. updates: number of updates
        already made. A gradient that is not finite skips the update if the scaler is enabled, and is a UserError
        otherwise.
        """
        gradient /= scaler.scale
        size = norm(gradient)
        finite = isfinite(size)
        rate_unet, rate_text = (
            learning_rate(updates, base, self.parameters.warmup_steps)
            for base in (self.parameters.learning_rate_unet, self.parameters.learning_rate_text)
        )
        if not finite and not scaler.enabled:
            raise UserError(
                f"The gradient is not finite ({size}). "
                "Lower the learning rate, or look at the base and the images of this step."
            )
        scaler.update(finite)
        if finite:
            if size > self.parameters.clip_norm:
                gradient *= self.parameters.clip_norm / (size + 1e-6)  # 1e-6 as in torch's clip_grad_norm_
            start = 0
            for _, weight in self.trained:
                weight.grad = gradient[start : start + weight.numel()].view(weight.shape).to(weight.dtype)
                start += weight.numel()
            for group, rate in zip(self.lion.param_groups, (rate_unet, rate_text), strict=True):
                group["lr"] = rate
            self.lion.step()
            for _, weight in self.trained:
                weight.grad = None
        return size, rate_unet, rate_text

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state: `<weight>.state1` (uint8 or float32) and, for 8-bit states, `<weight>.absmax1`."""
        return {
            f"{name}.{key}": self.lion.state[weight][key]
            for name, weight in self.trained
            for key in STATE_KEYS
            if key in self.lion.state[weight]
        }

    def load(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Load a state saved after `steps` steps. It is empty if every step so far overflowed; then nothing is done."""
        if not tensors:
            return
        for group_index, group in enumerate(self.lion.param_groups):
            for index, weight in enumerate(group["params"]):
                self.lion.init_state(group, weight, group_index, index)
        for name, weight in self.trained:
            state = self.lion.state[weight]
            state["step"] = steps
            for key in STATE_KEYS:
                if key in state:
                    state[key].copy_(tensors[f"{name}.{key}"])
