"""Invariant: a rebuild is called the release only where a published figure, hash or tensor is met; where none can be,
it is said why.
"""

from pathlib import Path

from kohaku_delta.dataset import published_counts as figures
from kohaku_delta.dataset.dataset_statistics import bucket_counts
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import PublishedFile
from kohaku_delta.verify import compare_tensors, published_files
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.findings import FAIL, PASS, SKIP, Finding, format_some, pass_or_fail

GROUP = "release"
OUTS = {
    "base": "build/delta-base.safetensors",
    "lokr": "build/delta-lokr.safetensors",
    "final": "build/kohaku-xl-delta.safetensors",
}
UNORDERED = "the release summed its gradients in no fixed order on two cards, so its bits cannot be had again by anyone"
WHY_NOT = {
    "base": "the published header is 6,924 bytes longer (what its merge tool noted there), so no rebuilt file can have that hash; its tensors can",
    "lokr": UNORDERED,
    "final": UNORDERED,
}


def check_release(rebuild: Artifact, folder: Path | None) -> list[Finding]:
    """Counts, buckets, steps; published hashes, by file and, against the published files in `folder`, by tensor."""
    target = rebuild.recipe.published
    if target is None:
        return [Finding(GROUP, "release", SKIP, "this is not the release: params.yaml has no published figures")]
    return (
        [_counts(rebuild)] + [_file(rebuild, name, getattr(target, name)) for name in OUTS] + _tensors(rebuild, folder)
    )


def _counts(rebuild: Artifact) -> Finding:
    posts, listed = rebuild.out("posts.parquet"), rebuild.out("bucket.txt")
    if posts is None or listed is None:
        return Finding(GROUP, "counts", SKIP, "posts.parquet or bucket.txt is not there")
    try:
        found = {"trained": parquet.read(posts, ["post_id"]).num_rows} | bucket_counts(listed, rebuild.recipe.schedule)
    except UserError as refusal:
        return Finding(GROUP, "counts", FAIL, refusal.message)
    compared = figures.compare_counts(found, rebuild.recipe.published.dataset)
    off = (
        compared["posts"]["difference"]
        or compared["steps"]["difference"]
        or compared["buckets"]["equal"] != compared["buckets"]["published"]
    )
    return Finding(GROUP, "counts", FAIL if off else PASS, figures.comparison_sentence(compared))


def _file(rebuild: Artifact, name: str, pin: PublishedFile) -> Finding:
    out = OUTS[name]
    writer = rebuild.records.get(rebuild.writers.get(out, ""))
    sha256 = (
        rebuild.digests[out].sha256
        if out in rebuild.digests
        else writer.outputs[out].sha256
        if writer and out in writer.outputs
        else None
    )
    if sha256 is None:
        return Finding(GROUP, name, SKIP, f"{out} is not there, and no record has its sha256")
    if sha256 != pin.sha256:
        return Finding(
            GROUP,
            name,
            SKIP,
            f"{out} is not the published file ({sha256[:16]}…, published {pin.sha256[:16]}…), and cannot be by its hash: {WHY_NOT[name]}",
        )
    if out not in rebuild.digests:
        return Finding(
            GROUP,
            name,
            SKIP,
            f"the record of {writer.stage} says that {out} was the published file; the file is not there to be looked at",
        )
    return Finding(GROUP, name, PASS, f"{out} is the published file, {pin.sha256[:16]}…")


def _tensors(rebuild: Artifact, folder: Path | None) -> list[Finding]:
    if folder is None:
        return [
            Finding(
                GROUP,
                "tensors",
                SKIP,
                "name the folder of the published files (--published) to compare tensor by tensor",
            )
        ]
    pins = published_files.published_hashes(rebuild.recipe)
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        names = {
            each.name.removeprefix("published.")
            for each in published_files.identify_file(published_files.sha256(path), pins)
        } & OUTS.keys()
        for name in sorted(names):
            ours = rebuild.folder / OUTS[name]
            if not ours.is_file():
                found.append(Finding(GROUP, f"tensors of {name}", SKIP, f"{OUTS[name]} is not there"))
                continue
            compared = compare_tensors.compare_files(ours, path)
            if compared.same_tensors:
                found.append(
                    Finding(
                        GROUP,
                        f"tensors of {name}",
                        PASS,
                        f"all {compared.tensors:,} tensors are those of the published {path.name}, bit for bit",
                    )
                )
                continue
            worst = format_some(each.name for each in compared.worst(3))
            said = f"{len(compared.differences):,} of {compared.tensors:,} tensors differ from {path.name}, most of all {worst}"
            found.append(
                Finding(GROUP, f"tensors of {name}", SKIP, f"{said}: {UNORDERED}")
                if name != "base"
                else pass_or_fail(GROUP, f"tensors of {name}", [said], "")
            )
    return found or [Finding(GROUP, "tensors", SKIP, f"{folder} holds no file with a published sha256")]
