"""The checks chain/selection, captions, statistics, curves, final, diffusers and card: outputs computed again from what
they were made of, by the code that their stages use, and compared byte by byte.

Weights are computed piece by piece and never written. Inputs are used only if they have the sha256 of inputs.json.
"""

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta import paths
from kohaku_delta.danbooru import schema
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, dataset_statistics, selection, tag_counts
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing, parquet, safetensors_io
from kohaku_delta.mappings import differing_keys
from kohaku_delta.printing import format_some
from kohaku_delta.provenance.artifact import Artifact, read_inputs
from kohaku_delta.regular_files import read_regular
from kohaku_delta.sdxl.tokenizer import ClipTokenizer
from kohaku_delta.training import journal as journals
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify.check_chain import ID, read_columns, require_journal, require_output
from kohaku_delta.verify.findings import Check, Skip, check

TABLES = ("selection", "posts", "dropped", "captions")
MAX_TEXT = 256 << 20  # bytes of a text that is compared
CARD = "README.md"


def find_inputs(rebuild: Artifact, own: Path | None, name: str) -> list[Path]:
    """The files of an input, of this recipe's folder or of `own`, once each has the sha256 of inputs.json. Raises Skip
    if they are not on this machine.
    """
    folder = own or (None if rebuild.bundle else rebuild.folder)
    if folder is None:
        raise Skip(f"a bundle holds no inputs ({name}): name your own recipe folder with --own")
    listed = [entry for entry in rebuild.inputs if entry["name"] == name]
    found = {entry["sha256"]: entry for entry in read_inputs(folder / paths.INPUTS)}
    files = []
    for entry in listed:
        here = found.get(entry["sha256"])
        path = Path(folder, paths.BUILD, here["path"]).resolve() if here else None
        if path is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise Skip(f"the input {name} is not on this machine")
        if _hash(path, path.stat().st_mtime_ns, path.stat().st_ctime_ns) != entry["sha256"]:
            raise Skip(f"the input {name} has another sha256 here than inputs.json says (lock/data with --data)")
        files.append(path)
    if not files:
        raise Skip(f"inputs.json names no {name}")
    return files


@functools.lru_cache(maxsize=64)
def _hash(path: Path, *times: int) -> str:
    return hashing.digest_path(path, md5=False).sha256


def _database(rebuild: Artifact, own: Path | None) -> Database:
    (path,) = find_inputs(rebuild, own, "database")
    source = Database(path)
    kinds = {kind for batch in source.stream("SELECT type FROM sqlite_master") for kind in batch.column(0).to_pylist()}
    if not kinds <= {"table", "index"}:
        raise UserError(f"{path} has views or triggers, which danbooru2023.db has not: it is not read.")
    return source


def _require(rebuild: Artifact, *outs: str) -> list[Path]:
    """The paths of outputs of which each exists. Raises Skip."""
    for out in outs:
        if out not in rebuild.digests:
            raise Skip(f"{out} does not exist")
    return [rebuild.folder / out for out in outs]


def _differing(rebuild: Artifact, made: Mapping[str, Path]) -> Iterator[str]:
    """A fault for each output of which the file or folder made again has another sha256."""
    for out, path in made.items():
        expected, found = hashing.digest_path(path, md5=False), rebuild.digests.get(out)
        if found is not None and found.sha256 != expected.sha256:
            files, here = expected.files or {}, found.files or {}
            names = differing_keys(files, here)
            yield f"{out} is not what it was made of gives" + (f": {format_some(names)}" if names else "")


@check("chain/selection", paths.SELECTION)
def check_selection(rebuild: Artifact, own: Path | None) -> Check:
    """selection.parquet is what the database and the parameters give."""
    require_output(rebuild, "selection.parquet")
    source = _database(rebuild, own)
    schema.check_schema(source)
    drawn = selection.select(source, rebuild.recipe.selection)
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        made = Path(temporary, "selection.parquet")
        parquet.write(drawn, made)
        yield from _differing(rebuild, {paths.SELECTION: made})
    return f"{drawn.num_rows:,} posts, drawn {pc.sum(drawn['drawn']).as_py():,} times from the database again: the same"


@check("chain/captions", paths.CAPTIONS, paths.ARTISTS, paths.CHARACTERS)
def check_captions(rebuild: Artifact, own: Path | None) -> Check:
    """The captions and the lists of artists and characters are what posts.parquet and the database give."""
    posts = require_output(rebuild, "posts.parquet")
    ids = read_columns(posts, ID)["post_id"].to_numpy()
    source, counts = _database(rebuild, own), tag_counts.TagCounter()
    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        made = {out: Path(temporary, Path(out).name) for out in (paths.CAPTIONS, paths.ARTISTS, paths.CHARACTERS)}
        captions.write_captions(source, ids, rebuild.recipe.caption, made[paths.CAPTIONS], counts)
        tag_counts.write_tag_counts(counts.artists(), made[paths.ARTISTS])
        tag_counts.write_tag_counts(counts.characters(), made[paths.CHARACTERS])
        yield from _differing(rebuild, made)
    return f"{len(ids):,} captions, artists and characters written again from the database: the same"


@check("chain/statistics", paths.DATASET, paths.STATISTICS)
def check_statistics(rebuild: Artifact, own: Path | None) -> Check:
    """dataset.json and the plots are what the dataset's tables and the database give."""
    files = {name: require_output(rebuild, f"{name}.parquet") for name in TABLES}
    lists = zip(("artists", "characters", "buckets"), (paths.ARTISTS, paths.CHARACTERS, paths.BUCKETS), strict=True)
    for name, out in lists:
        files[name] = require_output(rebuild, Path(out).name)
        read_regular(files[name], dataset_statistics.MAX_BUCKETS if name == "buckets" else MAX_TEXT)
    source = _database(rebuild, own)
    tokenizer = ClipTokenizer(*(find_inputs(rebuild, own, f"tokenizer_{part}")[0] for part in ("vocab", "merges")))
    columns = {"selection": ["drawn"], "posts": ["post_id", "despite"], "dropped": ["reason"]}
    for name, listed in (columns | {"captions": ["keep", "general"]}).items():
        parquet.read_bounded(files[name], listed)
    from kohaku_delta.report import dataset_files  # imports matplotlib, which takes half a second

    with tempfile.TemporaryDirectory(prefix="kohaku-delta-") as temporary:
        made = {out: Path(temporary, Path(out).name) for out in (paths.DATASET, paths.STATISTICS)}
        try:
            dataset_files.write_statistics(rebuild.recipe, source, tokenizer, files, *made.values())
        except (pa.ArrowException, AttributeError, KeyError, TypeError, ValueError) as error:
            yield f"the tables are not what their stages write: {error}"
            return ""
        yield from _differing(rebuild, made)
    return "dataset.json and its plots, made again from the tables and the database: the same"


@check("chain/curves", paths.CURVES)
def check_curves(rebuild: Artifact, journal: Journal | None) -> Check:
    """curves.csv is what the journal gives."""
    path, rows = require_output(rebuild, "curves.csv"), require_journal(journal).rows
    if not all(row["losses"] for row in rows):
        yield "a step of the journal has no losses"
    elif read_regular(path, MAX_TEXT) != "".join(journals.curve_lines(rows)).encode():
        yield f"{paths.CURVES} is not what the journal gives"
    return f"{len(rows):,} rows, written again from the journal: the same"


@check("chain/final", paths.FINAL)
def check_final(rebuild: Artifact) -> Check:
    """The final model is base + scale · LoKr, tensor by tensor, with the header that bake writes."""
    base, lokr, final = _require(rebuild, paths.BASE, paths.LOKR, paths.FINAL)
    from kohaku_delta.weights import bake

    with bake.plan_bake(base, lokr, rebuild.recipe.bake, rebuild.recipe.model.side) as plan:
        expected = safetensors_io.expected_file(plan.specs, plan.produce, plan.metadata, bake.CONTENT_HASH)
    found = {name: tensor.sha256 for name, tensor in rebuild.tensors[paths.FINAL].tensors.items()}
    if differing := differing_keys(expected.tensors, found):
        yield f"{paths.FINAL} is not base + LoKr: {len(differing):,} tensors differ, {format_some(differing)}"
    else:
        with safetensors_io.open_file(final) as file:
            if file.header_bytes() != expected.header:
                yield f"{paths.FINAL} has another header than bake writes"
    return f"{len(found):,} tensors, {plan.tensors:,} of them changed, baked again from base and LoKr: the same"


@check("chain/diffusers", paths.DIFFUSERS)
def check_diffusers(rebuild: Artifact) -> Check:
    """The diffusers folder has the final model's tensors, the recipe's configurations and the pinned tokenizers."""
    final, folder = _require(rebuild, paths.FINAL, paths.DIFFUSERS)
    found = rebuild.digests[paths.DIFFUSERS].files or {}
    pinned = {entry["name"]: entry["sha256"] for entry in rebuild.inputs}
    tokenizers = {}
    for name in ("tokenizer", "tokenizer_2"):
        texts = {part: f"{name}/{file}" for part, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))}
        for part, file in texts.items():
            if f"{name}_{part}" not in pinned:
                raise Skip(f"inputs.json names no {name}_{part}")
            if found.get(file) != pinned[f"{name}_{part}"]:
                yield f"{paths.DIFFUSERS}/{file} is not the input {name}_{part}"
                return ""
        tokenizers[name] = (folder / texts["vocab"], folder / texts["merges"])
    from kohaku_delta.weights import export_diffusers

    expected = {}
    with export_diffusers.plan_export(final, tokenizers, rebuild.recipe.model) as plan:
        for name, content in plan.files.items():
            expected[name] = hashlib.sha256(content).hexdigest()
        for name, (specs, produce) in plan.weights.items():
            expected[name] = safetensors_io.expected_file(specs, produce, export_diffusers.METADATA).sha256 or ""
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            yield f"{paths.DIFFUSERS}/{name} is not a file that export writes"
        elif name not in found:
            yield f"{paths.DIFFUSERS}/{name} does not exist"
        elif found[name] != expected[name]:
            yield f"{paths.DIFFUSERS}/{name} is not what {paths.FINAL} and params.yaml give"
    return f"{len(expected)} files, made again from {paths.FINAL}, params.yaml and the tokenizers: the same"


@check("chain/card")
def check_card(rebuild: Artifact) -> Check:
    """The model card is what dvc.lock and the outputs give, with or without a provenance that was signed later."""
    text = read_regular(require_output(rebuild, CARD), MAX_TEXT)
    from kohaku_delta.report import build_summary, model_card  # imports huggingface_hub

    build = build_summary.read_build(rebuild.folder)
    cards = [model_card.render_card(each).encode() for each in (build, dataclasses.replace(build, provenance=None))]
    final = rebuild.digests[paths.FINAL].sha256 if paths.FINAL in rebuild.digests else ""
    if text not in cards:
        if final.encode() not in text:
            raise Skip(f"build/{CARD} is of an earlier or another build: `kohaku-delta card` writes it")
        yield f"build/{CARD} names this build's final model, and was changed: `kohaku-delta card` writes it"
    return f"build/{CARD}, written again from dvc.lock and the outputs: the same"
