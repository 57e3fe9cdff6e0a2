"""Ranks start from the inputs of one run and from one state, whichever machines they are on; otherwise all of them stop
with an error.

Machines need not share a folder. The newest state that any of them has is sent to all: a state is a function of the
inputs, so it does not matter who saved it, nor from which state training goes on: a damaged one costs the steps since
the newest sound one, on all ranks alike. A state is sent as a safetensors file in memory; nothing is pickled.
"""

import json
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from kohaku_delta.errors import UserError
from kohaku_delta.mappings import differing_keys
from kohaku_delta.training import checkpointing, gradient_reduction, journal, run_folders
from kohaku_delta.training.checkpointing import TrainingState
from kohaku_delta.training.journal import Journal


def all_gather_int(value: int, ranks: int, device: str) -> list[int]:
    """Every rank's number (int64), by rank."""
    gathered = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    with gradient_reduction.collective_errors():
        dist.all_gather(gathered, torch.tensor([value], dtype=torch.int64, device=device))
    return [int(tensor) for tensor in gathered]


def mismatching_ranks(fingerprint: int, ranks: int, device: str) -> list[int]:
    """The ranks whose fingerprint (0 … 2^64 − 1) is not rank 0's. Finds a GPU that computes wrong in the same step."""
    values = all_gather_int(fingerprint - (1 << 63), ranks, device)
    return [rank for rank, value in enumerate(values) if value != values[0]]


def broadcast_bytes(content: bytes, source: int, device: str) -> bytes:
    """The bytes of rank `source`, on every rank."""
    with gradient_reduction.collective_errors():
        length = torch.tensor([len(content)], device=device)
        dist.broadcast(length, source)
        buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
        if dist.get_rank() == source:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, source)
    return buffer.cpu().numpy().tobytes()


def require_same_run(depends: dict[str, str], ranks: int, device: str) -> None:
    """Abort on every rank if any rank's inputs differ from rank 0's. That rank names what differs."""
    of_rank_0 = json.loads(broadcast_bytes(json.dumps(depends).encode(), 0, device))
    differing = differing_keys(depends, of_rank_0)
    others = [rank for rank, count in enumerate(all_gather_int(len(differing), ranks, device)) if count]
    if differing:
        raise UserError(
            f"Rank {dist.get_rank()} cannot train with rank 0: {checkpointing.format_differing(differing)}. "
            "All machines need the same code, libraries, GPU, parameters and files: copy what differs from the machine "
            "of rank 0."
        )
    if others:
        raise UserError(
            f"The inputs of rank {others[0]} are not those of rank 0; it says what differs, on its own machine."
        )


def load_newest_state(folder: Path, header: dict, ranks: int, device: str) -> tuple[int, TrainingState | None]:
    """(steps, the newest sound state that any rank finds in its machine's `folder`); (0, None) if there is no state.

    A rank whose state is damaged sets it aside on its machine, and all ranks agree again on the newest of the others.
    """
    faults: dict[int, str] = {}  # of this rank
    while True:
        own = (step for step in run_folders.saved_steps(folder) if step not in faults)
        steps = all_gather_int(max(own, default=0), ranks, device)
        done = max(steps)
        if not done:
            damaged = all_gather_int(len(faults), ranks, device)
            if faults:
                raise UserError(checkpointing.no_sound_state(folder, faults))
            if any(damaged):
                raise UserError(
                    f"No saved state of any machine can be used; rank {damaged.index(max(damaged))} says why."
                )
            return 0, None
        source, state = steps.index(done), None
        if dist.get_rank() == source:
            try:
                state = checkpointing.load(folder, done, header)
            except UserError as error:
                faults[done] = error.message
        if any(all_gather_int(int(state is not None), ranks, device)):
            break
    checkpointing.set_damaged_aside(folder, faults)
    received = broadcast_bytes(_serialize(state) if state else b"", source, device)
    if state:
        return done, state
    state = _deserialize(received, header)
    if mismatch := checkpointing.fingerprint_mismatch(state.tensors, state.journal):
        raise UserError(
            f"Rank {dist.get_rank()} received the state of rank {source} with other bits ({mismatch}): "
            "network or memory is at fault. Run the stage again."
        )
    return done, state


def _serialize(state: TrainingState) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, journal.SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(state.journal.rows, schema=journal.SCHEMA))
    rows = torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)
    return save(state.tensors | {"journal": rows})


def _deserialize(content: bytes, header: dict) -> TrainingState:
    tensors = load(content)
    with pa.ipc.open_stream(tensors.pop("journal").numpy().tobytes()) as stream:
        rows = Journal(header, stream.read_all().to_pylist())
    return TrainingState(tensors, rows)
