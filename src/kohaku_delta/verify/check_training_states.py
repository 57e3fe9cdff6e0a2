"""Invariant: a saved state counts as this training's only if its folder's name, its rows and its tensors' bits all say
so.

The journal's last row has the fingerprint of the weights; the LoKr file holds them rounded to fp16. So the last state
binds the two by bits, and where the weights were fp16 all along, the file alone does.
"""

import hashlib
import json
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify.artifact import Artifact
from kohaku_delta.verify.consistency import LOKR
from kohaku_delta.verify.findings import FAIL, SKIP, Finding, format_some, pass_or_fail

INPUTS = {
    "base": "build/delta-base.safetensors",
    "posts": "build/posts.parquet",
    "captions": "build/captions.parquet",
    "schedule": "build/schedule.parquet",
}


def check_saved_states(rebuild: Artifact, said: Journal | None) -> Finding:
    """The states of this training continue to its journal, bit for bit; those of others are named."""
    folder = rebuild.folder / rebuild.recipe.execution.work
    if rebuild.bundle or said is None or not folder.is_dir():
        return Finding(
            "lock",
            "work",
            SKIP,
            "a bundle holds no states"
            if rebuild.bundle
            else "no saved states are there"
            if said
            else "there is no journal that they could belong to",
        )
    from kohaku_delta.training import checkpointing

    faults, foreign, done = [], [], 0
    for depends in sorted(folder.glob(f"*/{checkpointing.DEPENDS}")):
        here = depends.parent
        try:
            listed = json.loads(depends.read_text(encoding="utf-8"))["depends"]
            if hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16] != here.name:
                faults.append(
                    f"{here.name}: its name does not follow from its {checkpointing.DEPENDS}: it is of another run, or was edited"
                )
                continue
            other = _other(rebuild, listed)
        except (ValueError, TypeError, KeyError, AttributeError):
            faults.append(f"{here.name}: its {checkpointing.DEPENDS} cannot be read")
            continue
        if other:
            foreign.append(
                (
                    len(other),
                    f"{here.name} ({format_some(other)} differ)"
                    if len(other) > 1
                    else f"{here.name} ({other[0]} differs)",
                )
            )
            continue
        for step in checkpointing.saved_steps(here):
            done += 1
            try:
                *_, rows = checkpointing.load(here, step, said.header)
                if step > len(said.rows) or rows.rows[-1]["chain"] != said.rows[step - 1]["chain"]:
                    faults.append(
                        f"{here.name}: the state after step {step - 1} is not on the way of this journal: it is stale, or of another run"
                    )
            except UserError as refusal:
                faults.append(refusal.message.replace(str(rebuild.folder) + "/", ""))
            except (IndexError, KeyError):
                faults.append(f"{here.name}: the state after step {step - 1} has no rows, or is none")
    foreign = [words for _, words in sorted(foreign)]  # the nearest first
    if not done and not faults:
        return Finding(
            "lock",
            "work",
            SKIP,
            "no saved state of this training is there"
            + (f"; of other runs: {format_some(foreign)}" if foreign else ""),
        )
    return pass_or_fail(
        "lock",
        "work",
        faults,
        f"{done} saved states lie on the way of the journal, with its fingerprints"
        + (f"; of other runs, not looked at: {format_some(foreign)}" if foreign else ""),
    )


def _other(rebuild: Artifact, listed: dict[str, str]) -> list[str]:
    """What a run that depends on `listed` had that this one has not: of files and of recorded code."""
    here = {name: rebuild.digests[out].sha256 for name, out in INPUTS.items() if out in rebuild.digests}
    if train := rebuild.records.get("train"):
        for name in listed:
            if name.startswith("code of "):
                place = "src/" + name.removeprefix("code of ").replace(".", "/")
                known = [
                    each.after
                    for path, each in train.inputs.items()
                    if path.endswith((f"/{place}.py", f"/{place}/__init__.py"))
                    or path in (f"{place}.py", f"{place}/__init__.py")
                ]
                here[name] = known[0] if known else listed[name]
    return sorted(name for name, sha256 in here.items() if listed.get(name) != sha256)


def check_final_weights(rebuild: Artifact, said: Journal | None) -> Finding:
    """The LoKr file holds the weights whose fingerprint the journal's last row has."""
    path = rebuild.folder / LOKR
    if said is None or not path.is_file():
        return Finding(
            "chain",
            "weights",
            SKIP,
            f"{LOKR} is not there: its bits are not compared with the journal's last row"
            if said
            else "there is no journal to compare with",
        )
    from kohaku_delta.training import checkpointing, tensor_fingerprints

    last = said.rows[-1]["weights"]
    with safetensors_io.open_file(path) as file:
        tensors = {name: file.read(name) for name in file.specs if not name.endswith(".alpha")}
    if rebuild.recipe.train.weights == "float16":
        found, how = tensors, "the LoKr's tensors"
    else:
        place = _last(rebuild, said)
        if place is None:
            reason = "the file holds float32 weights in float16: only the last saved state binds them to the journal's last row, and it is not there"
            return Finding("chain", "weights", SKIP, reason)
        with safetensors_io.open_file(place / checkpointing.STATE) as file:
            found = {
                name.removeprefix("weights/"): file.read(name) for name in file.specs if name.startswith("weights/")
            }
        how = "the last saved state, which rounded to float16 is the LoKr,"
        other = [
            name
            for name in sorted(found.keys() | tensors.keys())
            if name not in found
            or name not in tensors
            or found[name].astype("float16").tobytes() != tensors[name].tobytes()
        ]
        if other:
            return Finding(
                "chain", "weights", FAIL, f"{LOKR} is not the last saved state rounded to float16: {format_some(other)}"
            )
    import torch

    ours = tensor_fingerprints.combine(
        tensor_fingerprints.fingerprints({name: torch.from_numpy(array.copy()) for name, array in found.items()})
    )
    return pass_or_fail(
        "chain",
        "weights",
        [] if ours == last else [f"{how} has not the fingerprint of the journal's last row"],
        f"{how} has the fingerprint of the journal's last row",
    )


def _last(rebuild: Artifact, said: Journal) -> Path | None:
    """The folder of the state after the last step of this journal."""
    from kohaku_delta.training import checkpointing, journal

    for folder in sorted((rebuild.folder / rebuild.recipe.execution.work).glob("*")):
        place = checkpointing.state_path(folder, len(said.rows))
        try:
            if (place / checkpointing.STATE).is_file() and journal.read_journal(place / checkpointing.JOURNAL).rows[-1][
                "chain"
            ] == said.rows[-1]["chain"]:
                return place
        except (UserError, IndexError):
            continue
    return None
