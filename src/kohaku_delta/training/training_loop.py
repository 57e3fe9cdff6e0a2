"""The training loop. The state after step s is a function of the declared inputs: the number of ranks, a kill or a
resume changes no bit.

One step: each rank runs its lanes' micro-batches in order → one flat gradient per lane → tree sum over all lanes →
clip → Lion8bit → journal row.
"""

import shutil
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from math import isfinite
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats.safetensors_io import WriteResult
from kohaku_delta.params import NETWORK_WEIGHTS, Recipe
from kohaku_delta.training import (
    batch_builder,
    checkpointing,
    distributed_state,
    divergence,
    first_non_finite,
    gradient_reduction,
    optimizer,
    rank_processes,
    run_folders,
    tensor_fingerprints,
)
from kohaku_delta.training import journal as journals
from kohaku_delta.training.batch_builder import Batch
from kohaku_delta.training.checkpointing import TrainingState
from kohaku_delta.training.training_context import TrainingContext
from kohaku_delta.weights import lokr_format


class TrainingLoop:
    """One rank's training. `run()` yields after every step and leaves the final weights in `adapter`."""

    def __init__(self, recipe: Recipe, context: TrainingContext, folder: Path, rank: int = 0, ranks: int = 1):
        self.recipe, self.model, self.adapter, self.builder = recipe, context.model, context.adapter, context.builder
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.lanes = gradient_reduction.lanes_of_rank(recipe.schedule.lanes, rank, ranks)
        self.schedule = context.schedule.combine_chunks()
        self.steps = context.steps
        # rows of step s: starts[s] … starts[s + 1] − 1
        self.starts = self.schedule["step"].to_numpy().searchsorted(range(self.steps + 1))
        self.trained = context.adapter.trained()
        self.optimizer = optimizer.Lion(self.trained, recipe.train)
        self.scaler = optimizer.LossScaler(recipe.train.precision == "float16")
        self.journal = journals.Journal(context.header)
        self.updates = 0  # steps that changed the weights: one that overflowed does not advance the warm-up
        self.stop_requested = False  # this rank got a signal
        self.failed_together = False  # all ranks know that a step failed, and leave it at the same place
        self.stopping = False  # all ranks stop after this step; a rank's request reaches the others with the losses

    def resume_from(self, step: int) -> None:
        """Load this machine's state after `step` steps."""
        self.load_state(step, checkpointing.load(self.folder, step, self.journal.header))

    def resume_latest(self) -> int:
        """Load the newest sound state that any rank's machine has. Returns its number of steps; 0 if there is none."""
        header = self.journal.header
        if self.ranks > 1:
            done, state = distributed_state.load_newest_state(self.folder, header, self.ranks, self.model.device)
        else:
            done, state = checkpointing.load_newest_state(self.folder, header)
        if state:
            self.load_state(done, state)
        return done

    def load_state(self, step: int, state: TrainingState) -> None:
        """Go on from a state after `step` steps. The loss scale and the warm-up follow from its journal."""
        self.journal = state.journal
        norms = [row["gradient_norm"] for row in state.journal.rows]
        self.updates, self.scaler = sum(map(isfinite, norms)), optimizer.LossScaler(self.scaler.enabled)
        for norm in norms:
            self.scaler.update(isfinite(norm))
        weights = checkpointing.select_prefix(state.tensors, "weights/")
        for name, weight in self.adapter.tensors().items():
            weight.copy_(weights[name])
        self.optimizer.load(checkpointing.select_prefix(state.tensors, "optimizer/"), step)

    def save(self, step: int) -> None:
        """Rank 0 saves the state after `step` steps and, every `milestone_every` steps, the LoKr file."""
        if self.rank:
            return
        if step % self.recipe.train.milestone_every == 0:
            self.write_lokr(self.folder / paths.milestone_name(step), self.adapter.tensors(), step)
        keep, milestone = self.recipe.execution.keep_states, self.recipe.train.milestone_every
        checkpointing.save(self.folder, step, self.state_tensors(), self.journal, keep, milestone)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What a saved state holds (TrainingState.tensors), still on the device."""
        return {f"weights/{name}": tensor for name, tensor in self.adapter.tensors().items()} | {
            f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()
        }

    def write_lokr(self, path: Path, tensors: dict[str, torch.Tensor], step: int) -> WriteResult:
        """Write the weights after `step` steps as a LoKr file."""
        weights = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        facts = {lokr_format.STEPS: str(step), "ss_num_train_images": str(len(self.builder.post_ids))}
        if start := self.journal.header.get(NETWORK_WEIGHTS):
            facts[lokr_format.START] = start
        return lokr_format.write_lokr(path, weights, self.recipe, self.journal.header["base"], facts)

    def copy_milestones(self, to: Path) -> None:
        """Copy the LoKr file of each milestone to the folder `to`. One that is missing or damaged is written again from
        its saved state. Raises UserError if that is missing too.
        """
        every, base = self.recipe.train.milestone_every, self.journal.header["base"]
        for step in range(every, self.steps + 1, every):
            path = self.folder / paths.milestone_name(step)
            if not _is_milestone(path, base, step):
                if not run_folders.state_path(self.folder, step).is_dir():
                    raise UserError(
                        f"{path} is missing or damaged, and there is no saved state after {step} steps to write it "
                        "from. The training itself is finished and saved: put file or state back (from the machine of "
                        "rank 0 at that time) and run the stage again. If both are lost, move the later states out of "
                        f"{self.folder}: the steps up to this milestone are then computed again."
                    )
                state = checkpointing.load(self.folder, step, self.journal.header)
                self.write_lokr(path, checkpointing.select_prefix(state.tensors, "weights/"), step)
            shutil.copyfile(path, to / path.name)

    def micro_batches(self, step: int) -> pa.Table:
        """The schedule's rows of a step, in order of their place."""
        return self.schedule.slice(self.starts[step], self.starts[step + 1] - self.starts[step])

    def rows(self, step: int) -> list[int]:
        """This rank's rows of the schedule in a step: lane after lane, each lane's micro-batches in order."""
        lanes = self.micro_batches(step)["lane"].to_numpy()
        return [int(self.starts[step]) + row for lane in self.lanes for row in (lanes == lane).nonzero()[0].tolist()]

    def lane_gradient(
        self, count: int, batches: Iterator[Batch], divisor: int, losses: list[torch.Tensor]
    ) -> torch.Tensor:
        """Σ scale · ∇(mean loss) / divisor over the next `count` micro-batches, added in order; flat, float32.

        The micro-batches' mean losses are appended to `losses`. A ragged micro-batch counts as much as a full one, as
        in the release.
        """
        total = torch.zeros(sum(weight.numel() for _, weight in self.trained), device=self.model.device)
        for _ in range(count):
            loss = self.model.losses(next(batches)).mean()
            losses.append(loss.detach())
            (loss * self.scaler.scale / divisor).backward()
            start = 0
            for _, weight in self.trained:
                assert weight.grad is not None
                total[start : start + weight.numel()] += weight.grad.view(-1)
                weight.grad = None
                start += weight.numel()
        return total

    def gradient(self, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, list[float], list[int]]:
        """The step's gradient (flat, float32, scaled), each micro-batch's loss by place, and each lane's fingerprint.

        `batches` yields those of `rows(step)`. Losses, fingerprints, stop requests and failures are exchanged as one
        vector of integers, in which only one rank fills each element: their sum is exact in any order. If a rank failed
        before the exchange, it raises its error, and the others a UserError.
        """
        rows = self.micro_batches(step)
        lane_count = self.recipe.schedule.lanes
        # the losses' bits by place, the lanes' fingerprints, the ranks that got a signal, the ranks that failed
        shared = torch.zeros(len(rows) + lane_count + 2 * self.ranks, dtype=torch.int64, device=self.model.device)
        tree = gradient_reduction.PairwiseSum()
        failure: Exception | None = None
        try:
            self.add_lanes(rows, batches, tree, shared)
        except Exception as error:  # also a full memory
            failure = error
        self.exchange(step, shared, failure)
        losses = shared[: len(rows)].to(torch.int32).view(torch.float32).tolist()
        self.check_losses(step, losses)
        gradient = gradient_reduction.all_reduce_tree(tree.sum(), self.ranks)
        fingerprints = shared[len(rows) : len(rows) + lane_count].tolist()
        return gradient, losses, [value & tensor_fingerprints.MASK for value in fingerprints]

    def add_lanes(
        self, rows: pa.Table, batches: Iterator[Batch], tree: gradient_reduction.PairwiseSum, shared: torch.Tensor
    ) -> None:
        """Add the gradients of this rank's lanes to `tree`, and write their losses and fingerprints into `shared`."""
        divisor = self.recipe.schedule.micro_batches if self.recipe.train.last_step_divisor == "full" else len(rows)
        lanes, places = rows["lane"].to_numpy(), rows["place"].to_numpy()
        for lane in self.lanes:
            lane_losses: list[torch.Tensor] = []
            total = self.lane_gradient(int((lanes == lane).sum()), batches, divisor, lane_losses)
            shared[len(rows) + lane] = tensor_fingerprints.tensor_fingerprint(total)
            for place, loss in zip(places[lanes == lane].tolist(), lane_losses, strict=True):
                shared[place] = loss.view(torch.int32)
            tree.add(total)

    def exchange(self, step: int, shared: torch.Tensor, failure: Exception | None) -> None:
        """Add up `shared` over the ranks, in place. Raises `failure`, the error of this rank, or a LostRanksError if
        another rank failed.
        """
        shared[self.rank - 2 * self.ranks] = int(self.stop_requested)
        shared[self.rank - self.ranks] = int(failure is not None)
        if self.ranks > 1:
            with gradient_reduction.collective_errors():
                dist.all_reduce(shared)
        stops, failures = shared[-2 * self.ranks : -self.ranks].tolist(), shared[-self.ranks :].tolist()
        self.failed_together = any(failures)
        if self.failed_together:
            rank = failures.index(1)
            raise failure or rank_processes.LostRanksError(f"Rank {rank} failed in step {step}; it says why.")
        self.stopping = any(stops)

    def check_losses(self, step: int, losses: list[float]) -> None:
        """Raises UserError, on every rank alike, if the losses of the step show that the training diverged."""
        wrong = divergence.non_finite_places(losses)
        before = [row["losses"] for row in self.journal.rows[-divergence.NON_FINITE_LOSSES :]]
        if divergence.losses_diverged([*before, losses]) or (wrong and not self.scaler.enabled):
            self.failed_together = True
            raise UserError(self.describe_divergence(step, wrong))

    def describe_divergence(self, step: int, places: list[int]) -> str:
        """What to tell about a step whose losses are not finite at these places."""
        rows = self.micro_batches(step)
        row = rows.filter(pc.equal(rows["place"], places[0])).to_pylist()[0]
        batch = self.builder.batch(row["posts"], row["visits"], (row["width"], row["height"]))
        first = first_non_finite.first_non_finite(self.model, self.adapter, batch)
        return (
            f"Step {step}: the loss of {len(places)} of {len(rows)} micro-batches is NaN or infinite, which a smaller "
            f"loss scale cannot fix. In micro-batch {places[0]} (posts {', '.join(map(str, row['posts']))}) {first}. "
            "Check the base, and whether its values fit train.precision."
        )

    def step(self, step: int, batches: Iterator[Batch]) -> None:
        """One update and its journal row. Raises UserError if its numbers went wrong, with the weights unchanged, or if
        the ranks' weights differ after it.
        """
        gradient, losses, lane_fingerprints = self.gradient(step, batches)
        scale = self.scaler.scale
        try:
            norm, rate_unet, rate_text = self.optimizer.step(self.updates, gradient, self.scaler)
        except UserError as error:
            self.failed_together = True  # every rank has the same gradient
            raise UserError(f"Step {step}: {error.message}") from None
        weights = tensor_fingerprints.fingerprints(self.adapter.tensors())
        combined = tensor_fingerprints.combine(weights)
        row = {
            "step": step,
            "visits": journals.visits_digest(self.micro_batches(step).to_pylist()),
            "losses": losses,
            "lanes": lane_fingerprints,
            "gradient_norm": norm,
            "learning_rate_unet": rate_unet,
            "learning_rate_text": rate_text,
            "scale": scale,
            "weights": combined,
            "optimizer": tensor_fingerprints.combine(tensor_fingerprints.fingerprints(self.optimizer.tensors())),
            "tensors": tensor_fingerprints.short_fingerprints(weights),
        }
        self.journal.append(row)
        self.updates += isfinite(norm)
        if self.ranks > 1 and (others := distributed_state.mismatching_ranks(combined, self.ranks, self.model.device)):
            raise UserError(
                f"After step {step} rank {others[0]} has other weights than rank 0: one of the two computes wrong. "
                "Check the GPUs, and run the stage again."
            )

    def run(self) -> Generator[tuple[int, float, float], None, None]:
        """Yield (steps done, mean loss, seconds) after each step. SIGTERM, SIGINT and SIGHUP stop it after a step,
        saved. If it fails, or the caller does, the last finished step is saved.
        """
        rank_processes.watch_signals(
            self.request_stop, (lambda: None) if self.ranks > 1 else rank_processes.stop_at_once
        )
        done = self.resume_latest()
        rows = [row for step in range(done, self.steps) for row in self.rows(step)]
        workers = self.recipe.execution.workers
        with closing(batch_builder.load_batches(self.builder, self.schedule, rows, workers)) as batches:
            try:
                for step in range(done, self.steps):
                    started = time.monotonic()
                    self.step(step, batches)
                    done = step + 1
                    intervals = (self.recipe.execution.save_every, self.recipe.train.milestone_every)
                    if any(done % every == 0 for every in intervals) or self.stopping or done == self.steps:
                        self.save(done)
                    losses = self.journal.rows[-1]["losses"]
                    yield done, sum(losses) / len(losses), time.monotonic() - started
                    if self.stopping:
                        return
            except BaseException as error:
                # its frames hold the graph, and saving needs a little of the GPU's memory
                traceback.clear_frames(error.__traceback__)
                with suppress(OSError):  # the error that is under way says more
                    self.save_finished_step(done)
                if self.failed_together and self.ranks > 1:  # the first rank that ends would end rank 0 as it saves
                    with suppress(UserError), gradient_reduction.collective_errors():
                        dist.barrier()
                raise

    def request_stop(self, signal_name: str) -> None:
        if self.ranks == 1:  # of several, the launcher says it
            rank_processes.write_stderr(rank_processes.STOPPING)
        self.stop_requested = True

    def save_finished_step(self, done: int) -> None:
        """After a failure, save the state after `done` steps, unless it is saved, or changed by an update."""
        if self.rank or not done or done in run_folders.saved_steps(self.folder):
            return
        if len(self.journal.rows) == done and not checkpointing.fingerprint_mismatch(
            self.state_tensors(), self.journal
        ):
            self.save(done)


def _is_milestone(path: Path, base: str, step: int) -> bool:
    """Whether the file is whole, and the LoKr after `step` steps on the base of this content digest."""
    try:
        metadata = lokr_format.verified_metadata(path)
    except UserError:
        return False
    return (metadata[lokr_format.BASE_DIGEST], metadata[lokr_format.STEPS]) == (base, str(step))
