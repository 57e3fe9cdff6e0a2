"""Invariant: the state after step s is a function of the declared inputs; the number of ranks, a kill or a resume
changes nothing.

A step: each rank runs its lanes' micro-batches in order → one flat gradient a lane → the lanes' tree → clip → Lion8bit
→ journal row.
"""

import signal
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
import torch.distributed as dist

from kohaku_delta.errors import UserError
from kohaku_delta.formats.safetensors_io import WriteResult
from kohaku_delta.params import Recipe
from kohaku_delta.training import (
    checkpointing,
    data_loader,
    distributed_state,
    gradient_reduction,
    optimizer,
    tensor_fingerprints,
)
from kohaku_delta.training import journal as journals
from kohaku_delta.training.batch_builder import Batch, BatchBuilder
from kohaku_delta.training.lokr_adapter import LokrAdapter
from kohaku_delta.training.sdxl_model import Sdxl
from kohaku_delta.weights import lokr_format


class TrainingContext(NamedTuple):
    """What a rank computes with."""

    model: Sdxl
    adapter: LokrAdapter
    source: BatchBuilder
    schedule: pa.Table
    header: dict  # of the journal


class TrainingLoop:
    """One rank's training. `run()` yields after every step and leaves the final weights in `adapter`."""

    def __init__(self, recipe: Recipe, parts: TrainingContext, folder: Path, rank: int = 0, ranks: int = 1):
        self.recipe, self.model, self.adapter, self.source = recipe, parts.model, parts.adapter, parts.source
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.lanes = gradient_reduction.lanes_of_rank(recipe.schedule.lanes, rank, ranks)
        self.schedule = parts.schedule.combine_chunks()
        self.starts = self.schedule["step"].to_numpy().searchsorted(range(int(self.schedule["step"][-1].as_py()) + 2))
        self.trained = parts.adapter.trained()
        self.optimizer = optimizer.Lion(self.trained, recipe.train)
        self.scaler = optimizer.Scaler(recipe.train.precision == "float16")
        self.journal = journals.Journal(parts.header)
        self.asked = False  # this rank was told to stop
        self.stopping = False  # all ranks stop after this step: what one is told the others hear with the losses

    @property
    def steps(self) -> int:
        return len(self.starts) - 1

    def resume_from(self, step: int) -> None:
        """Goes back (or forward) to the saved state after `step` steps."""
        self.load_state(step, checkpointing.load(self.folder, step, self.journal.header))

    def resume_latest(self) -> int:
        """Takes up the newest saved state, which need not lie on this rank's machine. Returns its steps; 0 where there
        is none.
        """
        if self.ranks == 1:
            done = max(checkpointing.saved_steps(self.folder), default=0)
            held = checkpointing.load(self.folder, done, self.journal.header) if done else None
        else:
            done, held = distributed_state.load_newest_state(
                self.folder, self.journal.header, self.ranks, self.model.device
            )
        if held:
            self.load_state(done, held)
        return done

    def load_state(self, step: int, held: distributed_state.State) -> None:
        tensors, (self.scaler.scale, self.scaler.good_steps), self.journal = held
        weights = checkpointing.select_prefix(tensors, "weights/")
        for name, weight in self.adapter.tensors().items():
            weight.copy_(weights[name])
        self.optimizer.load(checkpointing.select_prefix(tensors, "optimizer/"), step)

    def save(self, step: int) -> None:
        if self.rank == 0:
            tensors = {f"weights/{name}": tensor for name, tensor in self.adapter.tensors().items()}
            tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
            execution = self.recipe.execution
            if step % execution.milestone_every == 0:
                self.write(self.folder / f"delta-lokr-step{step:08d}.safetensors")
            checkpointing.save(
                self.folder,
                step,
                tensors,
                (self.scaler.scale, self.scaler.good_steps),
                self.journal,
                execution.keep_states,
                execution.milestone_every,
            )

    def write(self, path: Path) -> WriteResult:
        """The LoKr file of the weights as they are now."""
        weights = {name: tensor.cpu().numpy() for name, tensor in self.adapter.tensors().items()}
        facts = {"ss_steps": str(len(self.journal.rows)), "ss_num_train_images": str(len(self.source.post_ids))}
        return lokr_format.write_lokr(path, weights, self.recipe, self.journal.header["base"], facts)

    def micro_batches(self, step: int) -> pa.Table:
        """The schedule's rows of a step, in place order."""
        return self.schedule.slice(self.starts[step], self.starts[step + 1] - self.starts[step])

    def rows(self, step: int) -> list[int]:
        """This rank's rows of the schedule in a step: lane after lane, each lane's micro-batches in order."""
        lane = self.micro_batches(step)["lane"].to_numpy()
        return [int(self.starts[step]) + row for own in self.lanes for row in (lane == own).nonzero()[0].tolist()]

    def lane_gradient(
        self, count: int, batches: Iterator[Batch], divisor: int, losses: list[torch.Tensor]
    ) -> torch.Tensor:
        """The flat float32 gradient of the next `count` micro-batches, added in order; their mean losses are appended."""
        total = torch.zeros(sum(weight.numel() for _, weight in self.trained), device=self.model.device)
        for _ in range(count):
            loss = self.model.losses(next(batches)).mean()
            losses.append(loss.detach())
            (loss * self.scaler.scale / divisor).backward()
            start = 0
            for _, weight in self.trained:
                total[start : start + weight.numel()] += weight.grad.view(-1)
                weight.grad = None
                start += weight.numel()
        return total

    def gradient(self, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, list[float], list[int]]:
        """The step's gradient (flat, float32, scaled), the loss of each micro-batch in place order, and each lane's
        fingerprint.

        `batches` gives those of `rows(step)`. What one rank knows goes to the others as integers, each place from one
        rank: exact in any order.
        """
        rows = self.micro_batches(step)
        divisor = self.recipe.schedule.micro_batches if self.recipe.train.last_step_divisor == "full" else len(rows)
        lane, place = rows["lane"].to_numpy(), rows["place"].to_numpy()
        known = torch.zeros(len(rows) + self.recipe.schedule.lanes + 1, dtype=torch.int64, device=self.model.device)
        tree = gradient_reduction.PairwiseSum()
        for own in self.lanes:
            losses: list[torch.Tensor] = []
            total = self.lane_gradient(int((lane == own).sum()), batches, divisor, losses)
            known[len(rows) + own] = tensor_fingerprints.tensor_fingerprint(total)
            for at, loss in zip(place[lane == own].tolist(), losses, strict=True):
                known[at] = loss.view(torch.int32)
            tree.add(total)
        gradient = gradient_reduction.all_reduce_tree(tree.sum(), self.ranks)
        known[-1] = int(self.asked)
        if self.ranks > 1:
            with gradient_reduction.collective_errors():
                dist.all_reduce(known)
        self.stopping = bool(known[-1])
        losses = known[: len(rows)].to(torch.int32).view(torch.float32).tolist()
        return gradient, losses, [number & tensor_fingerprints.MASK for number in known[len(rows) : -1].tolist()]

    def step(self, step: int, batches: Iterator[Batch]) -> None:
        """One update and its journal row."""
        gradient, losses, of_lanes = self.gradient(step, batches)
        scale = self.scaler.scale
        updates = sum(
            isfinite(row["gradient_norm"]) for row in self.journal.rows
        )  # a step that overflowed does not advance the warm-up
        norm, rate_unet, rate_text = self.optimizer.step(updates, gradient, self.scaler)
        weights = tensor_fingerprints.fingerprints(self.adapter.tensors())
        row = {
            "step": step,
            "visits": journals.visits_digest(self.micro_batches(step).to_pylist()),
            "losses": losses,
            "lanes": of_lanes,
            "gradient_norm": norm,
            "learning_rate_unet": rate_unet,
            "learning_rate_text": rate_text,
            "scale": scale,
            "weights": tensor_fingerprints.combine(weights),
            "optimizer": tensor_fingerprints.combine(tensor_fingerprints.fingerprints(self.optimizer.tensors())),
            "tensors": tensor_fingerprints.short_fingerprints(weights),
        }
        self.journal.append(row)
        if self.ranks > 1 and (
            other := gradient_reduction.mismatching_ranks(row["weights"], self.ranks, self.model.device)
        ):
            raise UserError(
                f"After step {step} rank {other[0]} has other weights than rank 0: one of the two computes wrong. Check the cards, and run the stage again."
            )

    def run(self) -> Iterator[tuple[int, float, float]]:
        """Yields (steps made, mean loss, seconds) a step. SIGTERM and SIGINT end after the current step, saved."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: setattr(self, "asked", True))
        done = self.resume_latest()
        rows = [row for step in range(done, self.steps) for row in self.rows(step)]
        batches = data_loader.batches(self.source, self.schedule, rows, self.recipe.execution.workers)
        for step in range(done, self.steps):
            began = time.monotonic()
            self.step(step, batches)
            if (step + 1) % self.recipe.execution.save_every == 0 or self.stopping or step + 1 == self.steps:
                self.save(step + 1)
            losses = self.journal.rows[-1]["losses"]
            yield step + 1, sum(losses) / len(losses), time.monotonic() - began
            if self.stopping:
                return
