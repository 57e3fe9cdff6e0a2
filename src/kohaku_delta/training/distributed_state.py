"""Invariant: ranks begin from one run's inputs and one state, whichever machine each of them is on; where they cannot,
every rank ends with a sentence.

Machines need not share a folder: the newest state that any of them has is sent to all (a state is a function of the
inputs, so the newest is right whoever kept it), as a safetensors file in memory; nothing is pickled.
"""

import json
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from kohaku_delta.errors import UserError
from kohaku_delta.training import checkpointing, gradient_reduction, journal
from kohaku_delta.training.journal import Journal

State = tuple[dict[str, torch.Tensor], tuple[float, int], Journal]  # as state.load gives it


def all_gather_int(own: int, ranks: int, device: str) -> list[int]:
    """Every rank's number, by rank."""
    gathered = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    with gradient_reduction.collective_errors():
        dist.all_gather(gathered, torch.tensor([own], dtype=torch.int64, device=device))
    return [int(each) for each in gathered]


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
    """Refuses, on every rank, a company in which one would train something else than rank 0: the rank itself says what
    differs.
    """
    theirs = json.loads(broadcast_bytes(json.dumps(depends).encode(), 0, device))
    differing = sorted(name for name in depends.keys() | theirs.keys() if depends.get(name) != theirs.get(name))
    others = [rank for rank, count in enumerate(all_gather_int(len(differing), ranks, device)) if count]
    if differing:
        raise UserError(
            f"Rank {dist.get_rank()} cannot train with rank 0: {', '.join(differing[:5])} {'differs' if len(differing) == 1 else 'differ'}. "
            "All machines need the same code, libraries, card, parameters and files: copy what differs from the machine of rank 0."
        )
    if others:
        raise UserError(
            f"Rank {others[0]} was given something else to train than rank 0; it says what, on its own machine."
        )


def load_newest_state(folder: Path, header: dict, ranks: int, device: str) -> tuple[int, State | None]:
    """(steps, the newest state that any rank finds in its machine's `folder`, verified); (0, None) when there is none."""
    steps = all_gather_int(max(checkpointing.saved_steps(folder), default=0), ranks, device)
    done = max(steps)
    if not done:
        return 0, None
    source, held, fault = steps.index(done), None, None
    if dist.get_rank() == source:
        try:
            held = checkpointing.load(folder, done, header)
        except UserError as refusal:
            fault = refusal
    if any(all_gather_int(int(fault is not None), ranks, device)):
        raise fault or UserError(
            f"Rank {source} has a state after step {done - 1} that cannot be taken up; it says why, on its own machine."
        )
    arrived = broadcast_bytes(_serialize(held) if held else b"", source, device)
    if held:
        return done, held
    held = _deserialize(arrived, header)
    if fault := checkpointing.fingerprint_mismatch(held[0], held[2]):
        raise UserError(
            f"Rank {dist.get_rank()} got the state of rank {source} with other bits ({fault}): network or memory is at fault. Run the stage again."
        )
    return done, held


def _serialize(held: State) -> bytes:
    tensors, scaler, rows = held
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, journal.SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(rows.rows, schema=journal.SCHEMA))
    return save(
        tensors
        | {
            "journal": torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8),
            "scaler": torch.tensor(scaler, dtype=torch.float64),
        }
    )


def _deserialize(content: bytes, header: dict) -> State:
    tensors = load(content)
    with pa.ipc.open_stream(tensors.pop("journal").numpy().tobytes()) as stream:
        rows = Journal(header, stream.read_all().to_pylist())
    scale, good_steps = tensors.pop("scaler").tolist()
    return tensors, (scale, int(good_steps)), rows
