"""Invariant: two rebuilds are called equal only where every out of every stage is; where they part, each kind of thing
is told by its first difference.

The order of the lines is that of the pipeline: input, post, caption, micro-batch, step (with its lane), tensor; so the
first line is the cause, and those behind it mostly its consequences.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.provenance.stage_record import Record
from kohaku_delta.training import journal as journals
from kohaku_delta.verify import consistency, replay_training
from kohaku_delta.verify.artifact import Artifact, verified_inputs
from kohaku_delta.verify.findings import format_some

TEXT = 160  # characters shown of a value


def differing_outputs(a: Artifact, b: Artifact) -> dict[str, list[str]]:
    """stage → its outs that differ, in the order of the pipeline; only stages that both locks have. Refuses two that
    share none.
    """
    shared = [name for name in a.stages if name in a.lock and name in b.lock]
    if not shared:
        raise UserError(
            f"{a.told} and {b.told} have no finished stage in common. Two rebuilds of one recipe can be compared."
        )
    return {
        name: [path for path in a.stages[name].outs if _hash(a, name, path) != _hash(b, name, path)] for name in shared
    }


def _hash(rebuild: Artifact, stage: str, path: str) -> str | None:
    """The md5 of an out as it is here, or, where it is not, as the lock says."""
    if path in rebuild.digests:
        return rebuild.digests[path].md5
    return next((each.md5 for each in rebuild.lock[stage].outs if each.path == path), None)


def stage_differences(a: Artifact, b: Artifact) -> Iterator[tuple[str, str]]:
    """(kind, sentence), a line each, in the order of the pipeline."""
    yield from _inputs(a, b)
    yield from _diff_parameters(a, b)
    for name in ("selection", "posts", "dropped"):
        yield from _rows(a, b, name, "post")
    yield from _rows(a, b, "captions", "caption")
    yield from _schedule(a, b)
    yield from _steps(a, b)
    yield from _tensors(a, b)


def _inputs(a: Artifact, b: Artifact) -> Iterator[tuple[str, str]]:
    one, other = (
        {each.get("url", each["name"]): each.get("sha256") for each in verified_inputs(rebuild)} for rebuild in (a, b)
    )
    names = {each.get("url", each["name"]): each["name"] for rebuild in (a, b) for each in verified_inputs(rebuild)}
    for url in sorted(one.keys() | other.keys()):
        if one.get(url) != other.get(url):
            here, there = (f"{each[url][:16]}…" if each.get(url) else "not there" for each in (one, other))
            yield "input", f"{names[url]}, {Path(url).name}: {here} | {there}"


def _diff_parameters(a: Artifact, b: Artifact) -> Iterator[tuple[str, str]]:
    """Parameters, code and libraries that the stages were given."""
    keys = {
        key
        for name in a.lock.keys() & b.lock.keys()
        for key in _flat(a.lock[name].parameters).items() ^ _flat(b.lock[name].parameters).items()
    }
    for key in sorted({key for key, _ in keys} - {"root"}):
        if not key.startswith("download.inputs."):  # said by _inputs
            one, other = (
                next(
                    (flat[key] for stage in each.lock.values() if key in (flat := _flat(stage.parameters))), "not there"
                )
                for each in (a, b)
            )
            yield "parameter", f"{key}: {_short(one)} | {_short(other)}"
    for kind in ("files", "libraries"):
        one, other = (
            {name: said for code in each.code.values() for name, said in getattr(code, kind).items()} for each in (a, b)
        )
        if names := sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)):
            yield "code" if kind == "files" else "library", format_some(names)


def _flat(value, place: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {key: leaf for name, each in value.items() for key, leaf in _flat(each, f"{place}{name}.").items()}
    return {place.rstrip("."): repr(value)}


def _short(text) -> str:
    return str(text) if len(str(text)) <= TEXT else str(text)[:TEXT] + "…"


def _tables(a: Artifact, b: Artifact, name: str) -> list[pa.Table] | None:
    places = [each.out(f"{name}.parquet") for each in (a, b)]
    if None in places or a.digests[f"build/{name}.parquet"] == b.digests[f"build/{name}.parquet"]:
        return None
    return [parquet.read(place).combine_chunks() for place in places]


def _rows(a: Artifact, b: Artifact, name: str, kind: str) -> Iterator[tuple[str, str]]:
    """The first row in which two tables by post_id differ."""
    tables = _tables(a, b, name)
    if tables is None:
        return
    one, other = tables
    if one.schema != other.schema:
        yield kind, f"{name}.parquet has other columns: {', '.join(one.column_names)} | {', '.join(other.column_names)}"
        return
    row = consistency.first_difference(one, other)
    if row is None:
        yield kind, f"{name}.parquet holds the same rows in other bytes"
        return
    here, there = (each.slice(row, 1).to_pylist()[0] if row < len(each) else None for each in tables)
    ids = [set(each["post_id"].to_pylist()) for each in tables]
    counts = f"{len(one):,} | {len(other):,} rows; {len(ids[0] - ids[1]):,} posts only in the first, {len(ids[1] - ids[0]):,} only in the second"
    if here is None or there is None or here["post_id"] != there["post_id"]:
        first = min(each["post_id"] for each in (here, there) if each)
        yield (
            kind,
            f"{name}.parquet: post {first} is only in the {'first' if here and here['post_id'] == first else 'second'} ({counts})",
        )
        return
    column = next(key for key in here if here[key] != there[key])
    unequal = sum(
        not pc.all(pc.fill_null(pc.equal(one[each], other[each]), True)).as_py()
        for each in one.column_names
        if len(one) == len(other) and not pa.types.is_nested(one[each].type)
    )
    yield (
        kind,
        f"{name}.parquet: post {here['post_id']}, {column}: {_short(here[column])} | {_short(there[column])}"
        + (f" ({unequal} columns differ)" if unequal > 1 else "")
        + (f" ({counts})" if len(one) != len(other) or ids[0] != ids[1] else ""),
    )


def _schedule(a: Artifact, b: Artifact) -> Iterator[tuple[str, str]]:
    tables = _tables(a, b, "schedule")
    if tables is None:
        return
    row = consistency.first_difference(*tables)
    if row is None:
        yield "micro-batch", "schedule.parquet holds the same rows in other bytes"
        return
    yield (
        "micro-batch",
        " | ".join(
            consistency.micro_batch(each, row) if row < len(each) else "the schedule has ended" for each in tables
        ),
    )


def _steps(a: Artifact, b: Artifact) -> Iterator[tuple[str, str]]:
    places = [each.out("journal.parquet") for each in (a, b)]
    if None in places or a.digests["build/journal.parquet"] == b.digests["build/journal.parquet"]:
        return
    one, other = (journals.read_journal(place) for place in places)
    if one.header.get("base") != other.header.get("base"):
        yield (
            "step",
            f"the journals begin with other bases: {str(one.header.get('base'))[:16]}… | {str(other.header.get('base'))[:16]}…",
        )
    scheduled, lokr = a.out("schedule.parquet"), a.tensors.get(consistency.LOKR)
    rows = parquet.read(scheduled, ["step", "lane", "posts"]) if scheduled else None
    names = sorted(name for name in lokr.tensors if not name.endswith(".alpha")) if lokr else []
    for step, (ours, theirs) in enumerate(zip_longest(one.rows, other.rows)):
        if ours is None or theirs is None:
            yield "step", f"one journal ends after {step:,} steps: {len(one.rows):,} | {len(other.rows):,}"
            return
        if {key: value for key, value in ours.items() if key != "chain"} != {
            key: value for key, value in theirs.items() if key != "chain"
        }:
            yield "step", f"step {step}: {_row(ours, theirs, rows, names, step)}"
            return
    if one.header == other.header:
        yield "step", "all rows are equal, and the journals end with other LoKr files"


def _row(ours: dict, theirs: dict, rows: pa.Table | None, names: list[str], step: int) -> str:
    if len(ours["losses"]) != len(theirs["losses"]) or len(ours["lanes"]) != len(theirs["lanes"]):
        return "the journals have other numbers of micro-batches or lanes"
    marks = {len(names), len(ours["tensors"]), len(theirs["tensors"])}
    batches = rows.filter(pc.equal(rows["step"], step)).to_pylist() if rows else []
    if len(batches) != len(ours["losses"]) or len(marks) > 1:
        place = next(
            (
                at
                for at, pair in enumerate(zip(ours["losses"], theirs["losses"]))
                if np.float32(pair[0]).tobytes() != np.float32(pair[1]).tobytes()
            ),
            None,
        )
        return f"the loss at place {place}" if place is not None else "its gradients, weights or visits"
    return (
        replay_training.first_step_difference(theirs, ours, batches, names, they="the second says")
        or "in a value that is not a number"
    )


def _tensors(a: Artifact, b: Artifact) -> Iterator[tuple[str, str]]:
    for out in [each for each in a.tensors if each in b.tensors and a.tensors[each] != b.tensors[each]]:
        one, other = a.tensors[out].tensors, b.tensors[out].tensors
        unequal = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        yield (
            "tensor",
            f"{out}: {unequal[0]}; {len(unequal):,} of {len(one.keys() | other.keys()):,} tensors differ"
            if unequal
            else f"{out}: other digests",
        )


def host_differences(a: Artifact, b: Artifact) -> list[str]:
    """What the records say that differed on the two hosts, a line a thing."""
    found: dict[str, None] = {}
    for name in [stage for stage in a.stages if stage in a.records and stage in b.records]:
        one, other = (_facts(each.records[name]) for each in (a, b))
        for key in [key for key in one | other if one.get(key) != other.get(key)]:
            found[f"{key}: {one.get(key) or 'none'} | {other.get(key) or 'none'}"] = None
    return list(found)


def _facts(each: Record) -> dict[str, str | None]:
    """What a record says of where its stage ran."""
    named = each.revision and each.revision.commit[:10] + (", changed" if each.revision.dirty else "")
    return {"container": each.container, "commit": named} | each.host | (each.numerics or {}) | each.libraries


def stages_in_one_only(a: Artifact, b: Artifact) -> list[str]:
    """Stages that only one lock has, and stages of other pipelines."""
    lines = [
        f"{name}: only in the {'first' if name in a.lock else 'second'}"
        for name in [*a.lock, *b.lock]
        if (name in a.lock) != (name in b.lock)
    ]
    return lines + ([f"{dvc_yaml.PIPELINE} declares other stages"] if list(a.stages) != list(b.stages) else [])
