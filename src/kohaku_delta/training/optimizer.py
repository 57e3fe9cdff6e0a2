"""Invariant: one update of Lion8bit from one summed gradient: scale off, clip, rate, step; the same on every rank.

Lion (Chen et al. 2023): c = β₁m + (1 − β₁)g; w ← w(1 − ηλ) − η·sign(c); m ← β₂m + (1 − β₂)g, with m in 8 bits
(bitsandbytes; tensors under 4,096 elements keep fp32).
"""

from importlib.metadata import version

import torch

from kohaku_delta.errors import UserError
from kohaku_delta.params import Train

BROKEN = ((0, 36, 0), (0, 41, 0))  # model card: 8-bit optimizers of these releases are wrong


def check_bitsandbytes(installed: str) -> None:
    """Refuses bitsandbytes 0.36.0 to 0.41.0."""
    number = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if BROKEN[0] <= number <= BROKEN[1]:
        raise UserError(
            f"bitsandbytes {installed} is installed; the 8-bit optimizers of 0.36.0 to 0.41.0 are broken. Install the version of the lock: `make repro` does."
        )


def learning_rate(step: int, base: float, warmup_steps: int) -> float:
    """Constant after a linear warm-up whose first rate is 0; `step`: updates made before."""
    return base * min(1.0, step / warmup_steps) if warmup_steps else base


class Scaler:
    """Dynamic loss scaling for fp16 (torch's GradScaler defaults; that class refuses fp16 gradients, the release
    patched the check away).
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, enabled: bool):
        self.scale, self.good_steps = (65536.0, 0) if enabled else (1.0, 0)
        self.enabled = enabled

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good_steps = self.scale * self.BACKOFF, 0
        elif self.good_steps + 1 == self.INTERVAL:
            self.scale, self.good_steps = self.scale * self.GROWTH, 0
        else:
            self.good_steps += 1


class Lion:
    """The optimizer over an adapter's trained weights, in two groups: U-Net and text encoders."""

    def __init__(self, trained: list[tuple[str, torch.nn.Parameter]], parameters: Train):
        check_bitsandbytes(version("bitsandbytes"))
        import bitsandbytes

        self.parameters = parameters
        self.trained = trained
        groups = [
            {"params": [weight for name, weight in trained if name.startswith("lora_unet_")], "lr": 0.0},
            {"params": [weight for name, weight in trained if name.startswith("lora_te")], "lr": 0.0},
        ]
        self.lion = bitsandbytes.optim.Lion8bit(
            groups, lr=0.0, betas=tuple(parameters.betas), weight_decay=parameters.weight_decay
        )

    def step(self, step: int, gradient: torch.Tensor, scaler: Scaler) -> tuple[float, float, float]:
        """gradient: the flat sum, float32, in the order of `trained`; changed in place. `step`: updates made before.
        Returns (gradient norm, U-Net rate, text rate).
        """
        gradient /= scaler.scale
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
        finite = norm == norm and norm != float("inf")
        rates = [
            learning_rate(step, base, self.parameters.warmup_steps)
            for base in (self.parameters.learning_rate_unet, self.parameters.learning_rate_text)
        ]
        if not finite and not scaler.enabled:
            raise UserError(
                f"The gradient of step {step} is not finite ({norm}). Lower the learning rate, or look at the base and the images of this step."
            )
        if finite:
            if norm > self.parameters.clip_norm:
                gradient *= self.parameters.clip_norm / (norm + 1e-6)
            start = 0
            for _, weight in self.trained:
                weight.grad = gradient[start : start + weight.numel()].view(weight.shape).to(weight.dtype)
                start += weight.numel()
            for group, rate in zip(self.lion.param_groups, rates):
                group["lr"] = rate
            self.lion.step()
            for _, weight in self.trained:
                weight.grad = None
        scaler.update(finite)
        return norm, *rates

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state: `<weight>.state1` (uint8 or float32) and `<weight>.absmax1`."""
        return {
            f"{name}.{key}": self.lion.state[weight][key]
            for name, weight in self.trained
            for key in ("absmax1", "state1")
            if key in self.lion.state[weight]
        }

    def load(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Takes up a saved state after `steps` steps. It is empty while every step so far overflowed: the optimizer
        then starts afresh.
        """
        if not tensors:
            return
        for group_index, group in enumerate(self.lion.param_groups):
            for index, weight in enumerate(group["params"]):
                self.lion.init_state(group, weight, group_index, index)
        for name, weight in self.trained:
            state = self.lion.state[weight]
            state["step"] = steps
            for key in ("absmax1", "state1"):
                if key in state:
                    state[key].copy_(tensors[f"{name}.{key}"])
