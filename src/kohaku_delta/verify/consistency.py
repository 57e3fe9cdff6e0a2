"""Invariant: what the dataset, the order and the journal say of each other is computed here from the files themselves,
not read from hashes.

Each is a pure function of those before it: the schedule is computed anew from posts.parquet, the digest of every step's
visits from the schedule; the journal's chain begins with the base's digest and ends with the LoKr's.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.training import journal as journals
from kohaku_delta.training import schedule, trainer
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.findings import FAIL, PASS, SKIP, Finding, check_or_fail, pass_or_fail

GROUP = "chain"
BASE, LOKR = "build/delta-base.safetensors", "build/delta-lokr.safetensors"


IDS = {"post_id": pa.int64()}
SCHEDULED = dict(zip(schedule.SCHEMA.names, schedule.SCHEMA.types))
SIZES = IDS | {"width": pa.int32(), "height": pa.int32()}


def read_columns(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    """Columns of these types without a gap. Refuses others."""
    found = parquet.read(path, list(types))
    for name, kind in types.items():
        if found.schema.field(name).type != kind or found[name].null_count:
            raise UserError(
                f"build/{path.name}: the column {name} is not what its stage writes ({kind}, without gaps)."
            )
    return found


def check_dataset(rebuild: Artifact) -> Finding:
    """Each selected post is trained on or dropped, and each that is trained on has a caption."""
    places = {name: rebuild.out(f"{name}.parquet") for name in ("selection", "posts", "dropped", "captions")}
    if missing := [name for name, place in places.items() if place is None]:
        return Finding(GROUP, "dataset", SKIP, f"{', '.join(f'{name}.parquet' for name in missing)} not there")
    ids = {name: read_columns(place, IDS)["post_id"].to_numpy() for name, place in places.items()}
    faults = []
    for name, each in ids.items():
        if len(each) > 1 and not (each[1:] > each[:-1]).all():
            faults.append(
                f"{name}.parquet is not in ascending order of post_id, or has a post twice: {each[1:][each[1:] <= each[:-1]][0]}"
            )
    both = np.union1d(ids["posts"], ids["dropped"])
    for name, one, other in (
        ("selected, and neither trained on nor dropped", ids["selection"], both),
        ("trained on or dropped, and not selected", both, ids["selection"]),
    ):
        faults += [f"post {post} is {name}" for post in np.setdiff1d(one, other)[:3]]
    faults += [f"post {post} is trained on and dropped" for post in np.intersect1d(ids["posts"], ids["dropped"])[:3]]
    faults += [
        f"post {post} has a caption and is not trained on, or has none"
        for post in np.setxor1d(ids["posts"], ids["captions"])[:3]
    ]
    return pass_or_fail(
        GROUP,
        "dataset",
        faults,
        f"{len(ids['selection']):,} selected = {len(ids['posts']):,} trained on, each with a caption, + {len(ids['dropped']):,} dropped",
    )


def check_schedule(rebuild: Artifact) -> Finding:
    """schedule.parquet and bucket.txt are what posts.parquet and the parameters give."""
    posts, scheduled = rebuild.out("posts.parquet"), rebuild.out("schedule.parquet")
    if posts is None or scheduled is None:
        return Finding(GROUP, "order", SKIP, "posts.parquet or schedule.parquet is not there")
    sizes = read_columns(posts, SIZES)
    if min(pc.min(sizes["width"]).as_py() or 1, pc.min(sizes["height"]).as_py() or 1) < 1:
        return Finding(GROUP, "order", FAIL, "posts.parquet has a picture without an extent")
    ours, buckets = schedule.build_schedule(sizes, rebuild.recipe.schedule)
    theirs = read_columns(scheduled, SCHEDULED).combine_chunks()
    row = first_difference(theirs, ours.combine_chunks())
    faults = (
        [
            f"schedule.parquet is not what posts.parquet gives: {micro_batch(theirs, row) if row < len(theirs) else 'it is too short'}"
        ]
        if row is not None
        else []
    )
    listed = rebuild.out("bucket.txt")
    if listed and listed.read_bytes() != schedule.bucket_lines(buckets).encode():
        faults.append("bucket.txt is not what posts.parquet gives")
    return pass_or_fail(
        GROUP,
        "order",
        faults,
        f"{len(ours):,} micro-batches in {ours['step'][-1].as_py() + 1:,} steps, computed anew from posts.parquet: the same",
    )


def first_difference(a: pa.Table, b: pa.Table) -> int | None:
    """The first row in which two tables of one schema differ (the length of the shorter one where that is all); None
    where they are equal.
    """
    if a.equals(b):
        return None
    low, high = 0, min(len(a), len(b))
    if a.slice(0, high).equals(b.slice(0, high)):
        return high
    while high - low > 1:  # a[:low] are equal, a[:high] are not
        middle = (low + high) // 2
        low, high = (middle, high) if a.slice(low, middle - low).equals(b.slice(low, middle - low)) else (low, middle)
    return low


def micro_batch(scheduled: pa.Table, row: int) -> str:
    """What a row of the schedule is."""
    each = scheduled.slice(row, 1).to_pylist()[0]
    return f"step {each['step']}, lane {each['lane']}, place {each['place']} ({each['width']}x{each['height']}, posts {', '.join(map(str, each['posts'] or []))})"


def check_journal(rebuild: Artifact) -> tuple[list[Finding], Journal | None]:
    """The journal's chain is unbroken, of this recipe, and visits what the schedule says; the journal where it can be
    read.
    """
    path = rebuild.out("journal.parquet")
    if path is None:
        return [Finding(GROUP, "journal", SKIP, "journal.parquet is not there")], None
    try:
        said = journals.read_journal(path)
    except UserError as refusal:
        return [Finding(GROUP, "journal", FAIL, refusal.message.replace(str(rebuild.folder) + "/", ""))], None
    if not said.rows:
        return [Finding(GROUP, "journal", FAIL, "journal.parquet has no row")], None
    found = [Finding(GROUP, "journal", PASS, f"{len(said.rows):,} rows, each chained to the one before")]
    ours, theirs = json.loads(json.dumps(trainer.result_parameters(rebuild.recipe))), said.header.get("parameters")
    theirs = theirs if isinstance(theirs, dict) else {}
    other = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    found.append(
        pass_or_fail(
            GROUP,
            "trained",
            [f"the journal was trained with another {key} than params.yaml has" for key in other],
            f"{len(ours)} parameters that move bits are those of params.yaml",
        )
    )
    return found + [
        check_or_fail(GROUP, "visits", _check_visits, rebuild, said),
        _check_base(rebuild, said),
        *_check_lokr(rebuild, said),
    ], said


def _check_visits(rebuild: Artifact, said: Journal) -> Finding:
    path = rebuild.out("schedule.parquet")
    if path is None:
        return Finding(GROUP, "visits", SKIP, "schedule.parquet is not there")
    scheduled = read_columns(path, SCHEDULED)
    steps = int(pc.max(scheduled["step"]).as_py() or 0) + 1 if len(scheduled) else 0
    if steps != len(said.rows):
        return Finding(GROUP, "visits", FAIL, f"the journal has {len(said.rows):,} steps, the schedule {steps:,}")
    starts = np.searchsorted(scheduled["step"].to_numpy(), np.arange(steps + 1))
    for step, row in enumerate(said.rows):
        batches = scheduled.slice(starts[step], starts[step + 1] - starts[step]).select(["posts", "visits"]).to_pylist()
        if (
            row["visits"] != journals.visits_digest(batches)
            or len(row["losses"]) != len(batches)
            or len(row["lanes"]) != rebuild.recipe.schedule.lanes
        ):
            return Finding(
                GROUP, "visits", FAIL, f"step {step} of the journal visited other posts than schedule.parquet says"
            )
    return Finding(
        GROUP, "visits", PASS, f"every one of {steps:,} steps visited the posts of schedule.parquet, in that order"
    )


def _check_base(rebuild: Artifact, said: Journal) -> Finding:
    if BASE not in rebuild.tensors:
        return Finding(GROUP, "base", SKIP, f"{BASE} and its digests are not there")
    digest = rebuild.tensors[BASE].digest
    if said.header.get("base") != digest:
        return Finding(
            GROUP,
            "base",
            FAIL,
            f"the journal begins with the base {str(said.header.get('base'))[:16]}…; {BASE} has the contents {digest[:16]}…",
        )
    return Finding(GROUP, "base", PASS, f"the journal begins with the contents of {BASE}, {digest[:16]}…")


def _check_lokr(rebuild: Artifact, said: Journal) -> list[Finding]:
    if LOKR not in rebuild.tensors:
        return [Finding(GROUP, "lokr", SKIP, f"{LOKR} and its digests are not there")]
    digest = rebuild.tensors[LOKR].digest
    if said.lokr is None:
        return [
            Finding(
                GROUP, "lokr", FAIL, "the journal has no end: it is that of an unfinished training, or was cut short"
            )
        ]
    if said.lokr != digest:
        return [
            Finding(
                GROUP,
                "lokr",
                FAIL,
                f"the journal ends with the LoKr {said.lokr[:16]}…; {LOKR} has the contents {digest[:16]}…",
            )
        ]
    return [Finding(GROUP, "lokr", PASS, f"the journal ends with the contents of {LOKR}, {digest[:16]}…")]
