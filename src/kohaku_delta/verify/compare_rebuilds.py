"""Where two rebuilds differ: the first difference of each kind, in the order of the pipeline.

The kinds are input, parameter, code, library, post, caption, micro-batch, step (with its lane) and tensor; the first
line is the cause, and the lines below it mostly its consequences. Rebuilds are equal only if every output of every
stage is, and equal is only what was hashed on both sides: an md5 in a dvc.lock is a claim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.mappings import differing_keys
from kohaku_delta.params import NETWORK_WEIGHTS
from kohaku_delta.printing import format_some
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.training import journal as journals
from kohaku_delta.training.schedule import SCHEMA as SCHEDULE
from kohaku_delta.verify import check_chain, check_lock, known_code, replay_training

MAX_TEXT = 160  # characters shown of a value
Line = tuple[str, str]  # kind, sentence; what is before “|” is the first rebuild's


@dataclass(frozen=True)
class OutputComparison:
    """Outputs by stage, in the order of the pipeline. Equal are those that were hashed on both sides in this run."""

    equal: dict[str, list[str]]  # of every stage in both locks
    unequal: dict[str, list[str]]
    claimed: dict[str, list[str]]  # a bundle leaves them out as weights; its dvc.lock has the md5 of the other side
    unknown: dict[str, list[str]]  # not hashed on both sides, for no reason that a bundle has

    @property
    def equal_stages(self) -> list[str]:
        """The stages of which every output is equal."""
        return [name for name in self.equal if name not in self.unequal | self.claimed | self.unknown]


def compare_outputs(a: Artifact, b: Artifact) -> OutputComparison:
    """Compares every output that either dvc.yaml declares, of the stages in both locks. Raises UserError if there are
    none.
    """
    shared = [name for name in a.stages if name in a.lock and name in b.lock and name in b.stages]
    if not shared:
        raise UserError(
            f"{a.name} and {b.name} have no finished stage in common. Two rebuilds of one recipe can be compared."
        )
    found = OutputComparison({name: [] for name in shared}, {}, {}, {})
    for name in shared:
        for out in dict.fromkeys(a.stages[name].outs + b.stages[name].outs):
            hashed = _is_hashed(a, name, out), _is_hashed(b, name, out)
            if _md5(a, name, out) != _md5(b, name, out):
                found.unequal.setdefault(name, []).append(out)
            elif all(hashed):
                found.equal[name].append(out)
            elif all(here or _is_left_out(side, name, out) for here, side in zip(hashed, (a, b), strict=True)):
                found.claimed.setdefault(name, []).append(out)
            else:
                found.unknown.setdefault(name, []).append(out)
    return found


def _is_hashed(rebuild: Artifact, stage: str, path: str) -> bool:
    """Whether the output is here and holds anything, or is the empty folder that dvc.lock describes."""
    digest = rebuild.digests.get(path)
    return digest is not None and (digest.files != {} or digest.md5 == _locked_md5(rebuild, stage, path))


def _is_left_out(rebuild: Artifact, stage: str, path: str) -> bool:
    """Whether a bundle lacks this output and may: weights."""
    locked = next((out for out in rebuild.lock[stage].outs if out.path == path), None)
    return rebuild.bundle is not None and locked is not None and check_lock.may_be_left_out(locked)


def _md5(rebuild: Artifact, stage: str, path: str) -> str | None:
    """The md5 of an output as it is here; of one that is not here, as dvc.lock has it."""
    here = _is_hashed(rebuild, stage, path)
    return rebuild.digests[path].md5 if here else _locked_md5(rebuild, stage, path)


def _locked_md5(rebuild: Artifact, stage: str, path: str) -> str | None:
    return next((out.md5 for out in rebuild.lock[stage].outs if out.path == path), None)


def unfinished_stages(a: Artifact, b: Artifact) -> list[str]:
    """The stages, of either dvc.yaml or of the pipeline at hand, that neither lock has."""
    names = dict.fromkeys([*a.stages, *b.stages, *sorted(known_code.stages_at_hand())])
    return [name for name in names if name not in a.lock and name not in b.lock]


def stage_differences(a: Artifact, b: Artifact) -> Iterator[Line]:
    """The first difference of each kind."""
    yield from _inputs(a, b)
    yield from _parameters(a, b)
    for field, kind in (("files", "code"), ("libraries", "library")):
        one, other = (
            {name: value for code in rebuild.code.values() for name, value in getattr(code, field).items()}
            for rebuild in (a, b)
        )
        if names := differing_keys(one, other):
            yield kind, format_some(names)
    for name, kind in (("selection", "post"), ("posts", "post"), ("dropped", "post"), ("captions", "caption")):
        yield from _posts(a, b, name, kind)
    yield from _schedule(a, b)
    yield from _steps(a, b)
    yield from _tensors(a, b)


def _inputs(a: Artifact, b: Artifact) -> Iterator[Line]:
    names = {entry["url"]: entry["name"] for entry in a.inputs + b.inputs}
    one, other = ({entry["url"]: entry["sha256"] for entry in rebuild.inputs} for rebuild in (a, b))
    for url in differing_keys(one, other):
        here, there = (f"{sha256s[url][:16]}…" if url in sha256s else "missing" for sha256s in (one, other))
        yield "input", f"{names[url]}, {Path(url).name}: {here} | {there}"


def _parameters(a: Artifact, b: Artifact) -> Iterator[Line]:
    """The parameters that the stages in both locks ran with, by dotted key; the pins are covered by the inputs."""
    shared = [name for name in a.lock if name in b.lock]
    one, other = (
        {key: value for name in shared for key, value in _flatten(rebuild.lock[name].parameters).items()}
        for rebuild in (a, b)
    )
    yield from _parameter_lines(one, other)


def parameter_differences(one: dict, other: dict) -> Iterator[Line]:
    """The keys of two params.yaml that differ, dotted."""
    yield from _parameter_lines(_flatten(one), _flatten(other))


def _parameter_lines(one: dict[str, str], other: dict[str, str]) -> Iterator[Line]:
    for key in differing_keys(one, other):
        if key != "root" and not key.startswith("download.inputs."):
            yield "parameter", f"{key}: {_short(one.get(key, 'missing'))} | {_short(other.get(key, 'missing'))}"


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in _flatten(item, f"{path}{name}.").items()}
    return {path.rstrip("."): repr(value)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _differing_files(a: Artifact, b: Artifact, name: str) -> list[Path]:
    """The paths of a file under build/ in both rebuilds, if both have it and it differs; else none."""
    out = f"{paths.BUILD}/{name}"
    both = out in a.digests and out in b.digests and a.digests[out] != b.digests[out]
    return [a.folder / out, b.folder / out] if both else []


def _posts(a: Artifact, b: Artifact, name: str, kind: str) -> Iterator[Line]:
    """The first row in which two tables with one row per post differ."""
    tables = [parquet.read_bounded(path).combine_chunks() for path in _differing_files(a, b, f"{name}.parquet")]
    if not tables:
        return
    one, other = tables
    if one.schema != other.schema or not all(map(_has_posts, tables)):
        yield kind, f"{name}.parquet has other columns: {', '.join(one.column_names)} | {', '.join(other.column_names)}"
        return
    row = check_chain.first_difference(one, other)
    if row is None:
        yield kind, f"{name}.parquet holds the same rows in other bytes"
        return
    here, there = (table.slice(row, 1).to_pylist()[0] if row < len(table) else None for table in tables)
    ids = [set(table["post_id"].to_pylist()) for table in tables]
    counts = (
        f"{len(one):,} | {len(other):,} rows; {len(ids[0] - ids[1]):,} posts only in the first, "
        f"{len(ids[1] - ids[0]):,} only in the second"
    )
    if here is None or there is None or here["post_id"] != there["post_id"]:
        post = min(found["post_id"] for found in (here, there) if found)
        side = "first" if here and here["post_id"] == post else "second"
        yield kind, f"{name}.parquet: post {post} is only in the {side} ({counts})"
        return
    column = next(key for key in here if here[key] != there[key])
    columns = sum(
        not pc.all(pc.fill_null(pc.equal(one[key], other[key]), True)).as_py()
        for key in one.column_names
        if len(one) == len(other) and not pa.types.is_nested(one[key].type)
    )
    values = f"{_short(here[column])} | {_short(there[column])}"
    yield (
        kind,
        f"{name}.parquet: post {here['post_id']}, {column}: {values}"
        + (f" ({columns} columns differ)" if columns > 1 else "")
        + (f" ({counts})" if ids[0] != ids[1] else ""),
    )


def _has_posts(table: pa.Table) -> bool:
    return "post_id" in table.column_names and table["post_id"].type == pa.int64() and not table["post_id"].null_count


def _schedule(a: Artifact, b: Artifact) -> Iterator[Line]:
    tables = [parquet.read_bounded(path).combine_chunks() for path in _differing_files(a, b, "schedule.parquet")]
    if not tables:
        return
    if any(not table.schema.equals(SCHEDULE) for table in tables):
        yield "micro-batch", "schedule.parquet has other columns than the schedule stage writes"
        return
    row = check_chain.first_difference(*tables)
    if row is None:
        yield "micro-batch", "schedule.parquet holds the same rows in other bytes"
        return
    batches = (
        check_chain.describe_micro_batch(table, row) if row < len(table) else "the schedule has ended"
        for table in tables
    )
    yield "micro-batch", " | ".join(batches)


def _steps(a: Artifact, b: Artifact) -> Iterator[Line]:
    differing = _differing_files(a, b, "journal.parquet")
    if not differing:
        return
    one, other = (journals.read_journal(path) for path in differing)
    bases = [str(journal.header.get("base"))[:16] for journal in (one, other)]
    if one.header.get("base") != other.header.get("base"):
        yield "step", f"the journals begin with other bases: {bases[0]}… | {bases[1]}…"
    if one.header.get(NETWORK_WEIGHTS) != other.header.get(NETWORK_WEIGHTS):
        starts = [str(journal.header.get(NETWORK_WEIGHTS) or "a new one")[:16] for journal in (one, other)]
        yield "step", f"the journals begin with other LoKr files: {starts[0]} | {starts[1]}"
    schedule, lokr = a.output("schedule.parquet"), a.tensors.get(paths.LOKR)
    micro_batches = parquet.read_bounded(schedule) if schedule else None
    if micro_batches and not micro_batches.schema.equals(SCHEDULE):
        micro_batches = None
    names = sorted(name for name in lokr.tensors if not name.endswith(".alpha")) if lokr else []
    for step, (ours, theirs) in enumerate(zip_longest(one.rows, other.rows)):
        if ours is None or theirs is None:
            yield "step", f"one journal ends after {step:,} steps: {len(one.rows):,} | {len(other.rows):,}"
            return
        if ours | {"chain": ""} != theirs | {"chain": ""}:
            yield "step", f"step {step}: {_step(ours, theirs, micro_batches, names, step)}"
            return
    if one.header == other.header:
        yield "step", "all rows are equal, and the journals end with other LoKr files"


def _step(ours: dict, theirs: dict, schedule: pa.Table | None, names: list[str], step: int) -> str:
    """How two journal rows differ: as a replay says it if schedule and LoKr file fit the rows, else more roughly."""
    if len(ours["losses"]) != len(theirs["losses"]) or len(ours["lanes"]) != len(theirs["lanes"]):
        return "the journals have other numbers of micro-batches or lanes"
    batches = schedule.filter(pc.equal(schedule["step"], step)).to_pylist() if schedule else []
    if len(batches) == len(ours["losses"]) and len(names) == len(ours["tensors"]) == len(theirs["tensors"]):
        difference = replay_training.first_step_difference(theirs, ours, batches, names, they="the second says")
        return difference or "in a value that is not a number"
    losses = (np.asarray(row["losses"], np.float32).view(np.uint32) for row in (ours, theirs))
    places = np.flatnonzero(np.not_equal(*losses))
    return f"the loss at place {places[0]}" if len(places) else "its gradients, weights or visits"


def _tensors(a: Artifact, b: Artifact) -> Iterator[Line]:
    for out in a.tensors:
        if out in b.tensors and a.tensors[out] != b.tensors[out]:
            one, other = a.tensors[out].tensors, b.tensors[out].tensors
            names, total = differing_keys(one, other), len(one.keys() | other.keys())
            yield "tensor", f"{out}: {names[0]}; {len(names):,} of {total:,} tensors differ"


def host_differences(a: Artifact, b: Artifact) -> list[str]:
    """What differed on the two hosts according to the records."""
    lines: dict[str, None] = {}
    for name in a.stages:
        if name in a.records and name in b.records:
            one, other = _host_facts(a.records[name]), _host_facts(b.records[name])
            for key in one | other:
                if one.get(key) != other.get(key):
                    lines[f"{key}: {one.get(key) or 'none'} | {other.get(key) or 'none'}"] = None
    return list(lines)


def _host_facts(record: Record) -> dict[str, str | None]:
    revision = record.revision
    commit = revision.commit[:10] + (", changed" if revision.dirty else "") if revision else None
    return {"container": record.container, "commit": commit} | (record.numerics or {}) | record.host | record.libraries


def stages_in_one_only(a: Artifact, b: Artifact) -> list[str]:
    """The stages that only one of the locks has."""
    lines = [f"{name}: only in the first" for name in a.lock if name not in b.lock]
    lines += [f"{name}: only in the second" for name in b.lock if name not in a.lock]
    return lines + ([f"{dvc_yaml.PIPELINE} declares other stages"] if list(a.stages) != list(b.stages) else [])
