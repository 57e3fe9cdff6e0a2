"""The checks lock/work, chain/weights and chain/milestones: the saved states of the training against its journal and
its LoKr files.

Each row of the journal has the fingerprint of the float32 weights, and a LoKr file holds them rounded to float16, so
the state saved after that step connects both bit by bit. If the weights were float16 all along, the file alone does.

torch is imported inside functions: the audit of a bundle, which has no states, does without it.
"""

from pathlib import Path

import numpy as np

from kohaku_delta import paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.mappings import differing_keys
from kohaku_delta.params import NETWORK_WEIGHTS
from kohaku_delta.printing import format_some
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.training import journal
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify.check_chain import require_journal
from kohaku_delta.verify.findings import Check, Skip, check

INPUTS = {"base": paths.BASE, "posts": paths.POSTS, "captions": paths.CAPTIONS, "schedule": paths.SCHEDULE}


@check("lock/work")
def check_saved_states(rebuild: Artifact, own_journal: Journal | None) -> Check:
    """Every saved state of this training belongs to its journal, bit for bit; states of other trainings are named.

    A state belongs to this training if the folder's name follows from its depends.json, and that names our inputs,
    parameters and code. The folder of a training by an earlier revision may lie beside it.
    """
    if rebuild.bundle:
        raise Skip("a bundle holds no states")
    work = rebuild.work
    if work is None:
        raise Skip("execution.work is outside the recipe's folder: the states there are not read")
    own_journal = require_journal(own_journal)
    from kohaku_delta.training import run_folders

    foreign, count = [], 0
    for depends in sorted(work.glob(f"*/{run_folders.DEPENDS}")):
        folder = depends.parent
        try:
            digests = run_folders.read_dependencies(folder).depends
        except (UserError, OSError):
            yield f"{folder.name}: its {run_folders.DEPENDS} cannot be read"
            continue
        differing = _differing_inputs(rebuild, digests)
        if run_folders.run_key(digests) != folder.name.removesuffix(run_folders.SET_ASIDE):
            yield (
                f"{folder.name}: its name does not follow from its {run_folders.DEPENDS}: "
                "it is of another run, or was edited"
            )
        elif differing:
            verb = "differ" if len(differing) > 1 else "differs"
            foreign.append((len(differing), f"{folder.name} ({format_some(differing)} {verb})"))
        else:
            for step in run_folders.saved_steps(folder):
                count += 1
                yield from _state_faults(rebuild, folder, step, own_journal)
    others = format_some(text for _, text in sorted(foreign))  # the fewest differences first
    if not count:
        raise Skip("no saved state of this training exists" + (f"; of other runs: {others}" if others else ""))
    return f"{count} saved states belong to the journal, with its fingerprints" + (
        f"; of other runs, not checked: {others}" if others else ""
    )


def _differing_inputs(rebuild: Artifact, digests: dict[str, str]) -> list[str]:
    """The inputs, parameters and code of this rebuild's training that a run that depends on `digests` did not have."""
    from kohaku_delta.training.run_inputs import result_parameters

    ours: dict[str, str | None] = {NETWORK_WEIGHTS: rebuild.start}
    ours |= {name: rebuild.digests[out].sha256 for name, out in INPUTS.items() if out in rebuild.digests}
    ours |= {name: str(value) for name, value in result_parameters(rebuild.recipe).items()}
    if code := rebuild.code.get("train"):
        ours |= {f"code of {file}": digest for file, digest in code.files.items()}
    return sorted(name for name, value in ours.items() if digests.get(name) != value)


def _state_faults(rebuild: Artifact, folder: Path, step: int, own_journal: Journal) -> list[str]:
    from kohaku_delta.training import checkpointing

    try:
        *_, state_journal = checkpointing.load(folder, step, own_journal.header)
        if step <= len(own_journal.rows) and state_journal.rows[-1]["chain"] == own_journal.rows[step - 1]["chain"]:
            return []
    except UserError as error:
        return [error.message.replace(f"{rebuild.folder}/", "")]
    except (IndexError, KeyError):
        return [f"{folder.name}: the state after step {step - 1} has no rows"]
    return [f"{folder.name}: the state after step {step - 1} does not belong to this journal: stale, or of another run"]


@check("chain/weights", paths.LOKR)
def check_final_weights(rebuild: Artifact, own_journal: Journal | None) -> Check:
    """The LoKr file holds the weights whose fingerprint is in the journal's last row."""
    own_journal = require_journal(own_journal)
    path = rebuild.folder / paths.LOKR
    if not path.is_file():
        raise Skip(f"{paths.LOKR} does not exist: its bits are not compared with the journal's last row")
    proof, faults = _compare_weights(rebuild, own_journal, path, len(own_journal.rows))
    yield from faults
    if proof is None:
        raise Skip(
            "the file holds float32 weights in float16: only the last saved state connects them to the journal's "
            "last row, and it does not exist"
        )
    return f"{proof} has the fingerprint of the journal's last row"


@check("chain/milestones", paths.MILESTONES)
def check_milestones(rebuild: Artifact, own_journal: Journal | None) -> Check:
    """Each milestone's LoKr file holds the weights whose fingerprint is in the journal's row of its step."""
    own_journal, folder = require_journal(own_journal), rebuild.folder / paths.MILESTONES
    if not folder.is_dir():
        raise Skip(f"{paths.MILESTONES} does not exist: its bits are not compared with the journal")
    every, last = rebuild.recipe.train.milestone_every, len(own_journal.rows)
    steps = {paths.milestone_name(step): step for step in range(every, last + 1, every)}
    found = {file.name for file in folder.iterdir()}
    for name in sorted(found ^ steps.keys()):
        fault = "is not a milestone of this training" if name in found else "does not exist"
        yield f"{paths.MILESTONES}/{name} {fault}"
    if not steps:
        raise Skip(f"none was due: train.milestone_every is {every:,}, the journal has {last:,} steps")
    unproved = []
    for name, step in steps.items():
        if name in found:
            proof, faults = _compare_weights(rebuild, own_journal, folder / name, step)
            yield from faults
            unproved += [name] if proof is None else []
    if unproved:
        raise Skip(
            f"{format_some(unproved)} hold float32 weights in float16: only the states saved with them connect them to "
            "the journal, and these do not exist"
        )
    return f"{len(steps)} milestones, each with the fingerprint of its row of the journal"


def _compare_weights(rebuild: Artifact, own_journal: Journal, path: Path, step: int) -> tuple[str | None, list[str]]:
    """(what proves that a LoKr file holds the weights after `step` steps, faults). None: nothing does, because only a
    saved state could, and there is none.
    """
    import torch

    from kohaku_delta.training import checkpointing, tensor_fingerprints

    out = path.relative_to(rebuild.folder)
    with safetensors_io.open_file(path) as file:
        lokr = {name: file.read(name) for name in file.specs}
    alphas = {name: lokr.pop(name) for name in list(lokr) if name.endswith(".alpha")}
    alpha = np.float16(rebuild.recipe.lokr.alpha).tobytes()
    faults = [f"{out}: {name} is not lokr.alpha" for name, each in alphas.items() if each.tobytes() != alpha]
    weights, proof = lokr, "the LoKr's tensors"
    if rebuild.recipe.train.weights != "float16":
        state = _saved_state(rebuild, own_journal, step)
        if state is None:
            return None, faults
        proof = f"the state saved after {step:,} steps, which rounded to float16 is the LoKr,"
        with safetensors_io.open_file(state / checkpointing.STATE) as file:
            weights = {name[8:]: file.read(name) for name in file.specs if name.startswith("weights/")}
        rounded = {name: array.astype(np.float16).tobytes() for name, array in weights.items()}
        stored = {name: array.tobytes() for name, array in lokr.items()}
        if differing := differing_keys(rounded, stored):
            faults.append(
                f"{out} is not the state saved after {step:,} steps rounded to float16: {format_some(differing)}"
            )
            return proof, faults
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    fingerprint = tensor_fingerprints.combine(tensor_fingerprints.fingerprints(tensors))
    if fingerprint != own_journal.rows[step - 1]["weights"]:
        faults.append(f"{out}: {proof} does not have the fingerprint of the journal's row {step - 1}")
    return proof, faults


def _saved_state(rebuild: Artifact, own_journal: Journal, step: int) -> Path | None:
    """The folder of the state of this journal after `step` steps."""
    from kohaku_delta.training import checkpointing, run_folders

    for folder in sorted(rebuild.work.glob("*") if rebuild.work else []):
        state = run_folders.state_path(folder, step)
        try:
            rows = journal.read_journal(state / checkpointing.JOURNAL).rows
        except UserError:
            continue
        if (
            rows
            and rows[-1]["chain"] == own_journal.rows[step - 1]["chain"]
            and (state / checkpointing.STATE).is_file()
        ):
            return state
    return None
