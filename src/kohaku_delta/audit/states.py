"""Invariant: a saved state counts as this training's only if its folder's name, its rows and its tensors' bits all say so.

The journal's last row has the fingerprint of the weights; the LoKr file holds them rounded to fp16. So the last state binds the two by bits, and where the
weights were fp16 all along, the file alone does.
"""

import hashlib
import json
from pathlib import Path

from kohaku_delta.audit.chain import LOKR
from kohaku_delta.audit.findings import FAIL, SKIP, Finding, judged, some
from kohaku_delta.audit.rebuild import Rebuild
from kohaku_delta.checkpoint import stream
from kohaku_delta.refusal import Refusal
from kohaku_delta.training.journal import Journal

INPUTS = {"base": "build/delta-base.safetensors", "posts": "build/posts.parquet", "captions": "build/captions.parquet", "schedule": "build/schedule.parquet"}


def work(rebuild: Rebuild, said: Journal | None) -> Finding:
    """The states of this training continue to its journal, bit for bit; those of others are named."""
    folder = rebuild.folder / rebuild.recipe.execution.work
    if rebuild.bundle or said is None or not folder.is_dir():
        return Finding(
            "lock",
            "work",
            SKIP,
            "a bundle holds no states" if rebuild.bundle else "no saved states are there" if said else "there is no journal that they could belong to",
        )
    from kohaku_delta.training import state

    faults, foreign, done = [], [], 0
    for depends in sorted(folder.glob(f"*/{state.DEPENDS}")):
        here = depends.parent
        try:
            listed = json.loads(depends.read_text(encoding="utf-8"))["depends"]
            if hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16] != here.name:
                faults.append(f"{here.name}: its name does not follow from its {state.DEPENDS}: it is of another run, or was edited")
                continue
            other = _other(rebuild, listed)
        except (ValueError, TypeError, KeyError, AttributeError):
            faults.append(f"{here.name}: its {state.DEPENDS} cannot be read")
            continue
        if other:
            foreign.append((len(other), f"{here.name} ({some(other)} differ)" if len(other) > 1 else f"{here.name} ({other[0]} differs)"))
            continue
        for step in state.saved(here):
            done += 1
            try:
                *_, rows = state.load(here, step, said.header)
                if step > len(said.rows) or rows.rows[-1]["chain"] != said.rows[step - 1]["chain"]:
                    faults.append(f"{here.name}: the state after step {step - 1} is not on the way of this journal: it is stale, or of another run")
            except Refusal as refusal:
                faults.append(refusal.message.replace(str(rebuild.folder) + "/", ""))
            except (IndexError, KeyError):
                faults.append(f"{here.name}: the state after step {step - 1} has no rows, or is none")
    foreign = [words for _, words in sorted(foreign)]  # the nearest first
    if not done and not faults:
        return Finding("lock", "work", SKIP, "no saved state of this training is there" + (f"; of other runs: {some(foreign)}" if foreign else ""))
    return judged(
        "lock",
        "work",
        faults,
        f"{done} saved states lie on the way of the journal, with its fingerprints" + (f"; of other runs, not looked at: {some(foreign)}" if foreign else ""),
    )


def _other(rebuild: Rebuild, listed: dict[str, str]) -> list[str]:
    """What a run that depends on `listed` had that this one has not: of files and of recorded code."""
    here = {name: rebuild.digests[out].sha256 for name, out in INPUTS.items() if out in rebuild.digests}
    if train := rebuild.records.get("train"):
        for name in listed:
            if name.startswith("code of "):
                place = "src/" + name.removeprefix("code of ").replace(".", "/")
                known = [
                    each.after
                    for path, each in train.inputs.items()
                    if path.endswith((f"/{place}.py", f"/{place}/__init__.py")) or path in (f"{place}.py", f"{place}/__init__.py")
                ]
                here[name] = known[0] if known else listed[name]
    return sorted(name for name, sha256 in here.items() if listed.get(name) != sha256)


def weights(rebuild: Rebuild, said: Journal | None) -> Finding:
    """The LoKr file holds the weights whose fingerprint the journal's last row has."""
    path = rebuild.folder / LOKR
    if said is None or not path.is_file():
        return Finding(
            "chain",
            "weights",
            SKIP,
            f"{LOKR} is not there: its bits are not compared with the journal's last row" if said else "there is no journal to compare with",
        )
    from kohaku_delta.training import fingerprint, state

    last = said.rows[-1]["weights"]
    with stream.open_file(path) as file:
        tensors = {name: file.read(name) for name in file.specs if not name.endswith(".alpha")}
    if rebuild.recipe.train.weights == "float16":
        found, how = tensors, "the LoKr's tensors"
    else:
        place = _last(rebuild, said, state)
        if place is None:
            reason = "the file holds float32 weights in float16: only the last saved state binds them to the journal's last row, and it is not there"
            return Finding("chain", "weights", SKIP, reason)
        with stream.open_file(place / state.STATE) as file:
            found = {name.removeprefix("weights/"): file.read(name) for name in file.specs if name.startswith("weights/")}
        how = "the last saved state, which rounded to float16 is the LoKr,"
        other = [
            name
            for name in sorted(found.keys() | tensors.keys())
            if name not in found or name not in tensors or found[name].astype("float16").tobytes() != tensors[name].tobytes()
        ]
        if other:
            return Finding("chain", "weights", FAIL, f"{LOKR} is not the last saved state rounded to float16: {some(other)}")
    import torch

    ours = fingerprint.folded(fingerprint.each({name: torch.from_numpy(array.copy()) for name, array in found.items()}))
    return judged(
        "chain",
        "weights",
        [] if ours == last else [f"{how} has not the fingerprint of the journal's last row"],
        f"{how} has the fingerprint of the journal's last row",
    )


def _last(rebuild: Rebuild, said: Journal, state) -> Path | None:
    """The folder of the state after the last step of this journal."""
    from kohaku_delta.training import journal

    for folder in sorted((rebuild.folder / rebuild.recipe.execution.work).glob("*")):
        place = state.place(folder, len(said.rows))
        try:
            if (place / state.STATE).is_file() and journal.read(place / state.JOURNAL).rows[-1]["chain"] == said.rows[-1]["chain"]:
                return place
        except (Refusal, IndexError):
            continue
    return None
