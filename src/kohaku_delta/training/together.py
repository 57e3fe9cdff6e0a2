"""Invariant: ranks begin from one run's inputs and one state, whichever machine each of them is on; where they cannot, every rank ends with a sentence.

Machines need not share a folder: the newest state that any of them has is sent to all (a state is a function of the inputs, so the newest is
right whoever kept it), as a safetensors file in memory; nothing is pickled.
"""

import json
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from kohaku_delta.refusal import Refusal
from kohaku_delta.training import journal, lanes, state
from kohaku_delta.training.journal import Journal

State = tuple[dict[str, torch.Tensor], tuple[float, int], Journal]  # as state.load gives it


def numbers(own: int, ranks: int, device: str) -> list[int]:
    """Every rank's number, by rank."""
    gathered = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    with lanes.company():
        dist.all_gather(gathered, torch.tensor([own], dtype=torch.int64, device=device))
    return [int(each) for each in gathered]


def sent(content: bytes, source: int, device: str) -> bytes:
    """The bytes of rank `source`, on every rank."""
    with lanes.company():
        length = torch.tensor([len(content)], device=device)
        dist.broadcast(length, source)
        buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
        if dist.get_rank() == source:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, source)
    return buffer.cpu().numpy().tobytes()


def agree(depends: dict[str, str], ranks: int, device: str) -> None:
    """Refuses, on every rank, a company in which one would train something else than rank 0: the rank itself says what differs."""
    theirs = json.loads(sent(json.dumps(depends).encode(), 0, device))
    differing = sorted(name for name in depends.keys() | theirs.keys() if depends.get(name) != theirs.get(name))
    others = [rank for rank, count in enumerate(numbers(len(differing), ranks, device)) if count]
    if differing:
        raise Refusal(
            f"Rank {dist.get_rank()} cannot train with rank 0: {', '.join(differing[:5])} {'differs' if len(differing) == 1 else 'differ'}. "
            "All machines need the same code, libraries, card, parameters and files: copy what differs from the machine of rank 0."
        )
    if others:
        raise Refusal(f"Rank {others[0]} was given something else to train than rank 0; it says what, on its own machine.")


def newest(folder: Path, header: dict, ranks: int, device: str) -> tuple[int, State | None]:
    """(steps, the newest state that any rank finds in its machine's `folder`, verified); (0, None) when there is none."""
    steps = numbers(max(state.saved(folder), default=0), ranks, device)
    done = max(steps)
    if not done:
        return 0, None
    source, held, fault = steps.index(done), None, None
    if dist.get_rank() == source:
        try:
            held = state.load(folder, done, header)
        except Refusal as refusal:
            fault = refusal
    if any(numbers(int(fault is not None), ranks, device)):
        raise fault or Refusal(f"Rank {source} has a state after step {done - 1} that cannot be taken up; it says why, on its own machine.")
    arrived = sent(_packed(held) if held else b"", source, device)
    if held:
        return done, held
    held = _unpacked(arrived, header)
    if fault := state.strange(held[0], held[2]):
        raise Refusal(f"Rank {dist.get_rank()} got the state of rank {source} with other bits ({fault}): network or memory is at fault. Run the stage again.")
    return done, held


def _packed(held: State) -> bytes:
    tensors, scaler, rows = held
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, journal.SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(rows.rows, schema=journal.SCHEMA))
    return save(tensors | {"journal": torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8), "scaler": torch.tensor(scaler, dtype=torch.float64)})


def _unpacked(content: bytes, header: dict) -> State:
    tensors = load(content)
    with pa.ipc.open_stream(tensors.pop("journal").numpy().tobytes()) as stream:
        rows = Journal(header, stream.read_all().to_pylist())
    scale, good_steps = tensors.pop("scaler").tolist()
    return tensors, (scale, int(good_steps)), rows
