"""The checks release/*: counts, buckets, hashes and tensors against what the release published.

A rebuild passes only if a published figure, hash or tensor is met; if none can be, the finding says why.
"""

from dataclasses import dataclass
from pathlib import Path

from kohaku_delta import paths
from kohaku_delta.dataset import published_counts
from kohaku_delta.dataset.dataset_statistics import bucket_counts
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.params import PublishedDataset, PublishedFile, Recipe
from kohaku_delta.printing import format_some
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.verify import compare_tensors
from kohaku_delta.verify.check_chain import require_output
from kohaku_delta.verify.findings import SKIP, Check, Finding, Skip, check

OUTS = {"base": paths.BASE, "lokr": paths.LOKR, "final": paths.FINAL}
UNORDERED = "the release summed its gradients in no fixed order on several GPUs, so nobody can compute its bits again"
WHY_NOT = {
    "base": "the published header is 6,924 bytes longer (notes of its merge tool), so no rebuilt file can have that "
    "hash; its tensors can",
    "lokr": UNORDERED,
    "final": UNORDERED,
}


def check_release(rebuild: Artifact, folder: Path | None) -> list[Finding]:
    """All checks against `published` in params.yaml; `folder` holds published files, to compare tensor by tensor."""
    published = rebuild.recipe.published
    if published is None:
        return [Finding("release", "release", SKIP, "this is not the release: params.yaml has no published figures")]
    findings = [check_counts(rebuild, published.dataset)]
    findings += [check(f"release/{name}")(check_file)(rebuild, name, getattr(published, name)) for name in OUTS]
    if folder is None:
        reason = "name the folder of the published files (--published) to compare tensor by tensor"
        return [*findings, Finding("release", "tensors", SKIP, reason)]
    hashes = published_hashes(rebuild.recipe)
    files = [
        (name, path)
        for path in sorted(folder.rglob("*.safetensors"))
        for published_hash in identify_file(file_sha256(path), hashes)
        for name in OUTS
        if published_hash.name == f"published.{name}"
    ]
    if not files:
        findings.append(Finding("release", "tensors", SKIP, f"{folder} holds no file with a published sha256"))
    return findings + [check(f"release/tensors of {name}")(check_tensors)(rebuild, name, path) for name, path in files]


@check("release/counts")
def check_counts(rebuild: Artifact, published: PublishedDataset) -> Check:
    """The published numbers of posts, steps and images per bucket."""
    posts, buckets = require_output(rebuild, "posts.parquet"), require_output(rebuild, "bucket.txt")
    counts = {"trained": parquet.read_bounded(posts, ["post_id"]).num_rows}
    compared = published_counts.compare_counts(counts | bucket_counts(buckets, rebuild.recipe.schedule), published)
    sentence = published_counts.comparison_sentence(compared)
    if isinstance(compared, str):
        raise Skip(compared)
    if (
        compared["posts"]["difference"]
        or compared["steps"]["difference"]
        or compared["buckets"]["equal"] != compared["buckets"]["published"]
    ):
        yield sentence
    return sentence


def check_file(rebuild: Artifact, name: str, published: PublishedFile) -> str:
    """An output has the published sha256. One that has not is no failure: its header or its bits cannot be rebuilt."""
    out = OUTS[name]
    sha256 = rebuild.sha256(out)
    if sha256 is None:
        raise Skip(f"{out} does not exist, and no record has its sha256")
    if published.sha256 is None:
        raise Skip(f"the published sha256 of this file is not known (published.{name}.sha256)")
    if sha256 != published.sha256:
        raise Skip(
            f"{out} is not the published file ({sha256[:16]}…, published {published.sha256[:16]}…), and cannot be by "
            f"its hash: {WHY_NOT[name]}"
        )
    if out not in rebuild.digests:
        raise Skip(f"a record says that {out} was the published file; the file itself is not here")
    return f"{out} is the published file, {published.sha256[:16]}…"


def check_tensors(rebuild: Artifact, name: str, published: Path) -> Check:
    """The tensors of an output are those of the published file. Only those of the base can be expected to be."""
    path = rebuild.folder / OUTS[name]
    if not path.is_file():
        raise Skip(f"{OUTS[name]} does not exist")
    comparison = compare_tensors.compare_files(path, published)
    if not comparison.same_tensors:
        worst = format_some(difference.name for difference in comparison.worst(3))
        counts = f"{len(comparison.differences):,} of {comparison.tensors:,} tensors"
        fault = f"{counts} differ from {published.name}, most of all {worst}"
        if name != "base":
            raise Skip(f"{fault}: {UNORDERED}")
        yield fault
    return f"all {comparison.tensors:,} tensors are those of the published {published.name}, bit for bit"


@dataclass(frozen=True)
class PublishedHash:
    """A file that the recipe knows a sha256 of (whole, or its first digits)."""

    name: str
    sha256: str


def published_hashes(recipe: Recipe) -> list[PublishedHash]:
    """What the release published, then its inputs. Raises UserError if the recipe has no published files."""
    if recipe.published is None:
        raise UserError(
            "This recipe has no published files to compare with (its section `published` is null). Name the release's "
            "params.yaml with --params."
        )
    files = [(name, file) for name, file in recipe.published if isinstance(file, PublishedFile)]
    files += [(f"milestones.{step}", file) for step, file in recipe.published.milestones.items()]
    published = [(f"published.{name}", file.sha256) for name, file in files if file.sha256]
    inputs = [(f"download.inputs.{name}", pin.sha256) for name, pin in recipe.download.all_pins if pin.sha256]
    return [PublishedHash(name, sha256) for name, sha256 in published + inputs]


def file_sha256(path: Path) -> str:
    """The sha256 of a file. Raises UserError for a folder: only single files were published with a hash."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; only single files were published with a hash. Compare it with a folder, or with the "
            "single file: kohaku-delta tensors A B."
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist. Check the path.")
    return hash_file(path)


def identify_file(sha256: str, hashes: list[PublishedHash]) -> list[PublishedHash]:
    """Those of `hashes` that this sha256 has, whole or by its first digits; a file may stand under several names."""
    return [known for known in hashes if sha256.startswith(known.sha256)]
