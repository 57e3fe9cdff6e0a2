"""The checks chain/dataset, order, journal, trained, visits, numbers, base and lokr: what dataset, order and journal
say about each other, computed from the files themselves instead of from recorded hashes.

Each file is a function of those before it: the schedule is computed again from posts.parquet, and the digest of every
step's visits from the schedule; the journal begins with the digest of the base and ends with that of the LoKr file.
"""

import json
from math import isfinite
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta import paths
from kohaku_delta.dataset import dataset_statistics
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.mappings import differing_keys
from kohaku_delta.params import NETWORK_WEIGHTS
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.regular_files import read_regular
from kohaku_delta.training import divergence, run_inputs, schedule
from kohaku_delta.training import journal as journals
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify.findings import FAIL, PASS, SKIP, Check, Finding, Skip, check

ID = {"post_id": pa.int64()}
SIZES = ID | {"width": pa.int32(), "height": pa.int32()}
SCHEDULE = dict(zip(schedule.SCHEMA.names, schedule.SCHEMA.types, strict=True))

MAX_VISITS = 1 << 26  # the release has 3.6 million


def require_output(rebuild: Artifact, name: str) -> Path:
    """The path of a file under build/. Raises Skip if it does not exist."""
    path = rebuild.output(name)
    if path is None:
        raise Skip(f"{name} does not exist")
    return path


def require_journal(journal: Journal | None) -> Journal:
    """The journal. Raises Skip if there is none that can be read."""
    if journal is None:
        raise Skip("there is no journal to compare with")
    return journal


def read_columns(path: Path, types: dict[str, pa.DataType]) -> pa.Table:
    """These columns of a table. Raises UserError if one has another type, or a null."""
    table = parquet.read_bounded(path, list(types))
    for name, kind in types.items():
        found = table[name]
        inner = pc.list_flatten(found) if pa.types.is_list(found.type) else found
        if found.type != kind or found.null_count or inner.null_count:
            raise UserError(f"build/{path.name}: the column {name} is not what its stage writes ({kind}, no nulls).")
    return table


@check("chain/dataset")
def check_dataset(rebuild: Artifact) -> Check:
    """Each selected post is trained on or dropped, and each post that is trained on has a caption."""
    ids = {
        name: read_columns(require_output(rebuild, f"{name}.parquet"), ID)["post_id"].to_numpy()
        for name in ("selection", "posts", "dropped", "captions")
    }
    for name, column in ids.items():
        if len(disorder := column[1:][column[1:] <= column[:-1]]):
            yield f"{name}.parquet is not in ascending order of post_id, or has a post twice: {disorder[0]}"
    selected, trained, dropped, captioned = ids.values()
    kept = np.union1d(trained, dropped)
    for posts, fault in (
        (np.setdiff1d(selected, kept), "is selected, and neither trained on nor dropped"),
        (np.setdiff1d(kept, selected), "is trained on or dropped, and not selected"),
        (np.intersect1d(trained, dropped), "is trained on and dropped"),
        (np.setxor1d(trained, captioned), "has a caption and is not trained on, or has none"),
    ):
        for post in posts[:3]:
            yield f"post {post} {fault}"
    if not len(selected):
        raise Skip("selection.parquet has no post")
    return f"{len(selected):,} selected = {len(trained):,} trained on, each with a caption, + {len(dropped):,} dropped"


@check("chain/order", paths.SCHEDULE, paths.BUCKETS)
def check_order(rebuild: Artifact) -> Check:
    """schedule.parquet and bucket.txt are what posts.parquet and the parameters give."""
    sizes = read_columns(require_output(rebuild, "posts.parquet"), SIZES)
    found = read_columns(require_output(rebuild, "schedule.parquet"), SCHEDULE).combine_chunks()
    if min(pc.min(sizes["width"]).as_py() or 1, pc.min(sizes["height"]).as_py() or 1) < 1:
        yield "posts.parquet has an image of width or height 0"
        return ""
    if not len(sizes):
        raise Skip("posts.parquet has no post")
    visits = len(sizes) * rebuild.recipe.schedule.epochs
    if visits > MAX_VISITS:
        raise Skip(f"{visits:,} visits of posts; at most {MAX_VISITS:,} are computed again")
    expected, buckets = schedule.build_schedule(sizes, rebuild.recipe.schedule)
    row = first_difference(found, expected.combine_chunks())
    if row is not None:
        where = describe_micro_batch(found, row) if row < len(found) else "it is too short"
        yield f"schedule.parquet is not what posts.parquet gives: {where}"
    listed = rebuild.output("bucket.txt")
    if listed and read_regular(listed, dataset_statistics.MAX_BUCKETS) != schedule.bucket_lines(buckets).encode():
        yield "bucket.txt is not what posts.parquet gives"
    steps = expected["step"][-1].as_py() + 1
    return f"{len(expected):,} micro-batches in {steps:,} steps, computed again from posts.parquet: the same"


def first_difference(a: pa.Table, b: pa.Table) -> int | None:
    """The first row in which two tables of one schema differ; the length of the shorter one if it is the other's
    beginning; None if they are equal.
    """
    if a.equals(b):
        return None
    low, high = 0, min(len(a), len(b))
    if a.slice(0, high).equals(b.slice(0, high)):
        return high
    while high - low > 1:  # the first `low` rows are equal, the first `high` are not
        middle = (low + high) // 2
        if a.slice(low, middle - low).equals(b.slice(low, middle - low)):
            low = middle
        else:
            high = middle
    return low


def describe_micro_batch(table: pa.Table, row: int) -> str:
    """A row of the schedule in words."""
    batch = table.slice(row, 1).to_pylist()[0]
    posts = ", ".join(map(str, batch["posts"] or []))
    where = f"step {batch['step']}, lane {batch['lane']}, place {batch['place']}"
    return f"{where} ({batch['width']}x{batch['height']}, posts {posts})"


def check_journal(rebuild: Artifact) -> tuple[Finding, Journal | None]:
    """chain/journal, and the journal itself if every row of it follows from the row before."""
    path = rebuild.output("journal.parquet")
    if path is None:
        return Finding("chain", "journal", SKIP, "journal.parquet does not exist"), None
    try:
        journal = journals.read_journal(path)
    except UserError as error:
        return Finding("chain", "journal", FAIL, error.message.replace(f"{rebuild.folder}/", "")), None
    if not journal.rows:
        return Finding("chain", "journal", FAIL, "journal.parquet has no rows"), None
    return Finding("chain", "journal", PASS, f"{len(journal.rows):,} rows, each chained to the one before"), journal


@check("chain/trained")
def check_trained_parameters(rebuild: Artifact, journal: Journal | None) -> Check:
    """The journal was trained with the parameters of params.yaml."""
    trained = require_journal(journal).header.get("parameters")
    trained = trained if isinstance(trained, dict) else {}
    current = json.loads(json.dumps(run_inputs.result_parameters(rebuild.recipe)))
    for key in differing_keys(current, trained):
        yield f"the journal was trained with another {key} than params.yaml has"
    return f"{len(current)} parameters that decide bits are those of params.yaml"


@check("chain/visits")
def check_visits(rebuild: Artifact, journal: Journal | None) -> Check:
    """Every step visited the posts of schedule.parquet, in its order."""
    rows = require_journal(journal).rows
    table = read_columns(require_output(rebuild, "schedule.parquet"), SCHEDULE)
    steps = int(pc.max(table["step"]).as_py() or 0) + 1 if len(table) else 0
    if steps != len(rows):
        yield f"the journal has {len(rows):,} steps, the schedule {steps:,}"
        return ""
    starts = np.searchsorted(table["step"].to_numpy(), np.arange(steps + 1))
    for step, row in enumerate(rows):
        batches = table.slice(starts[step], starts[step + 1] - starts[step]).select(["posts", "visits"]).to_pylist()
        if (
            any(len(batch["posts"]) != len(batch["visits"]) for batch in batches)
            or row["visits"] != journals.visits_digest(batches)
            or len(row["losses"]) != len(batches)
            or len(row["lanes"]) != rebuild.recipe.schedule.lanes
        ):
            yield f"step {step} of the journal visited other posts than schedule.parquet says"
            return ""
    return f"every one of {steps:,} steps visited the posts of schedule.parquet, in that order"


@check("chain/numbers")
def check_numbers(rebuild: Artifact, journal: Journal | None) -> Check:
    """Every loss is finite but a few, the loss scale never collapsed, and every update moved the weights."""
    rows = require_journal(journal).rows
    losses, wrong, overflows, still = [row["losses"] for row in rows], 0, 0, 0
    for step, row in enumerate(rows):
        wrong += len(divergence.non_finite_places(row["losses"]))
        if divergence.losses_diverged(losses[max(0, step - divergence.NON_FINITE_LOSSES) : step + 1]):
            yield f"step {step} has losses that are NaN or infinite, too many for a smaller loss scale to fix"
        updated = isfinite(row["gradient_norm"])
        overflows = 0 if updated else overflows + 1
        if overflows >= divergence.LONGEST_OVERFLOW or row["scale"] < divergence.LOWEST_SCALE:
            yield f"step {step}: the loss scale collapsed to {row['scale']:g} after {overflows} overflows in a row"
        moved = step > 0 and row["weights"] != rows[step - 1]["weights"]
        rates = row["learning_rate_unet"] or row["learning_rate_text"]
        if moved and not updated:
            yield f"step {step} changed the weights although its gradient overflowed"
        still += bool(step and updated and rates and not moved)
    if still:
        yield f"{still:,} updates with a learning rate above 0 left every weight as it was"
    skipped = sum(not isfinite(row["gradient_norm"]) for row in rows)
    count = sum(map(len, losses))
    if not count:
        raise Skip("the journal has no loss")
    return (
        f"{count - wrong:,} of {count:,} losses are finite, {skipped:,} of {len(rows):,} steps overflowed, "
        f"loss scale {min(row['scale'] for row in rows):g} or more; every update moved the weights"
    )


@check("chain/base")
def check_base(rebuild: Artifact, journal: Journal | None) -> Check:
    """The journal begins with the content digest of the base, and with the sha256 of the LoKr that the recipe begins
    with, if it names one.
    """
    header = require_journal(journal).header
    began, start = header.get(NETWORK_WEIGHTS), rebuild.start
    if began != start:
        named = [f"the LoKr {str(sha256)[:16]}…" if sha256 else "a new LoKr" for sha256 in (began, start)]
        yield f"the journal begins with {named[0]}; {paths.INPUTS} names {named[1]}"
    recorded, digest = str(header.get("base")), _content_digest(rebuild, paths.BASE)
    if recorded != digest:
        yield f"the journal begins with the base {recorded[:16]}…; {paths.BASE} has the contents {digest[:16]}…"
    with_start = f", and with the LoKr {start[:16]}… of {paths.INPUTS}" if start else ""
    return f"the journal begins with the contents of {paths.BASE}, {digest[:16]}…{with_start}"


@check("chain/lokr")
def check_lokr(rebuild: Artifact, journal: Journal | None) -> Check:
    """The journal ends with the content digest of the LoKr file."""
    recorded = require_journal(journal).lokr
    digest = _content_digest(rebuild, paths.LOKR)
    if recorded is None:
        yield "the journal has no end: it is that of an unfinished training, or was cut short"
    elif recorded != digest:
        yield f"the journal ends with the LoKr {recorded[:16]}…; {paths.LOKR} has the contents {digest[:16]}…"
    return f"the journal ends with the contents of {paths.LOKR}, {digest[:16]}…"


def _content_digest(rebuild: Artifact, out: str) -> str:
    if out not in rebuild.tensors:
        raise Skip(f"{out} and its digests do not exist")
    return rebuild.tensors[out].digest
