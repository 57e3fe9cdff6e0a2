"""Invariant: the state after step s is a function of the declared inputs; the number of ranks, a kill or a resume changes nothing.

A step: each rank runs its lanes' micro-batches in order → one flat gradient a lane → the lanes' tree → clip → Lion8bit → journal row.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist

from kohaku_delta.params import Recipe
from kohaku_delta.training import journal as journals
from kohaku_delta.training import lanes, optimizer, state
from kohaku_delta.training.adapter import Adapter
from kohaku_delta.training.batch import Source
from kohaku_delta.training.model import Sdxl


class Loop:
    """One rank's training. `run()` yields after every step and leaves the final weights in `adapter`."""

    def __init__(self, recipe: Recipe, model: Sdxl, adapter: Adapter, source: Source, schedule: pa.Table, base_digest: str, folder: Path, rank: int, ranks: int):
        self.recipe, self.model, self.adapter, self.source = recipe, model, adapter, source
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.lanes = lanes.own(recipe.schedule.lanes, rank, ranks)
        self.schedule = schedule.combine_chunks()
        self.starts = self.schedule["step"].to_numpy().searchsorted(range(int(self.schedule["step"][-1].as_py()) + 2))
        self.trained = adapter.trained()
        self.optimizer = optimizer.Lion(self.trained, recipe.train)
        self.scaler = optimizer.Scaler(recipe.train.precision == "float16")
        self.journal = journals.Journal(base_digest)
        self.stopping = False

    @property
    def steps(self) -> int:
        return len(self.starts) - 1

    def resume(self) -> int:
        """Takes up the newest state; returns the number of steps already made."""
        done = max(state.saved(self.folder), default=0)
        if done:
            tensors, (self.scaler.scale, self.scaler.good_steps), self.journal = state.load(self.folder, done, self.journal.start)
            for name, weight in self.adapter.tensors().items():
                weight.copy_(tensors[f"weights/{name}"])
            self.optimizer.load({name.removeprefix("optimizer/"): tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}, done)
        return done

    def save(self, step: int) -> None:
        if self.rank == 0:
            tensors = {f"weights/{name}": tensor for name, tensor in self.adapter.tensors().items()}
            tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
            state.save(self.folder, step, tensors, (self.scaler.scale, self.scaler.good_steps), self.journal, self.recipe.train.keep_states)

    def lane(self, rows: list[dict], losses: torch.Tensor, divisor: int) -> torch.Tensor:
        """The flat float32 gradient of one lane's micro-batches, added in order; their mean losses go to losses[place]."""
        total = torch.zeros(sum(weight.numel() for _, weight in self.trained), device=self.model.device)
        for row in rows:
            loss = self.model.losses(self.source.batch(row["posts"], row["visits"], (row["width"], row["height"]))).mean()
            losses[row["place"]] = loss.detach()
            (loss * self.scaler.scale / divisor).backward()
            start = 0
            for _, weight in self.trained:
                total[start : start + weight.numel()] += weight.grad.view(-1)
                weight.grad = None
                start += weight.numel()
        return total

    def step(self, step: int) -> None:
        """One update and its journal row."""
        rows = self.schedule.slice(self.starts[step], self.starts[step + 1] - self.starts[step]).to_pylist()
        divisor = self.recipe.schedule.micro_batches if self.recipe.train.last_step_divisor == "full" else len(rows)
        losses = torch.zeros(len(rows) + 1, device=self.model.device)
        tree = lanes.Tree()
        for lane in self.lanes:
            tree.add(self.lane([row for row in rows if row["lane"] == lane], losses, divisor))
        gradient = lanes.across(tree.sum(), self.ranks)
        losses[-1] = float(self.stopping)
        if self.ranks > 1:
            dist.all_reduce(losses)  # every place has one rank that is not zero: exact in any order
        self.stopping = bool(losses[-1])
        scale = self.scaler.scale
        norm, rate_unet, rate_text = self.optimizer.step(step, gradient, self.scaler)
        self.journal.append(
            {
                "step": step,
                "visits": journals.visits_digest([row["visits"] for row in rows]),
                "losses": losses[:-1].tolist(),
                "gradient_norm": norm,
                "learning_rate_unet": rate_unet,
                "learning_rate_text": rate_text,
                "scale": scale,
                "weights": journals.fingerprint(self.adapter.tensors()),
                "optimizer": journals.fingerprint(self.optimizer.tensors()),
            }
        )

    def run(self) -> Iterator[tuple[int, float, float]]:
        """Yields (steps made, mean loss, seconds) a step. SIGTERM ends after the current step, saved."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        for step in range(self.resume(), self.steps):
            began = time.monotonic()
            self.step(step)
            if (step + 1) % self.recipe.train.save_every == 0 or self.stopping:
                self.save(step + 1)
            losses = self.journal.rows[-1]["losses"]
            yield step + 1, sum(losses) / len(losses), time.monotonic() - began
            if self.stopping:
                return
