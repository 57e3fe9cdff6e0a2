"""An audit of a rebuild: all checks, in the order of their lines.

A check GROUP/name is in the module of its group: lock/* in lock, lock_inputs, lock_records and training_states
(lock/work); chain/* in chain, lock_records (chain/stages) and training_states (chain/weights); release/* in release;
fidelity/* in fidelity; replay/* in replay_stages and replay_training.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.verify import (
    chain,
    fidelity,
    lock,
    lock_inputs,
    lock_records,
    release,
    replay_stages,
    replay_training,
    training_states,
)
from kohaku_delta.verify.findings import Finding


@dataclass(frozen=True)
class Options:
    """What the auditor asks for beyond the files of the rebuild."""

    key: Path | None = None  # the signer's public key
    data: bool = False  # hash the inputs
    stages: bool = False  # run stages again
    replay: int | None = None  # train this many steps again,
    seed: int = 0  # drawn by this seed
    own: Path | None = None  # a recipe's folder with what a bundle lacks
    published: Path | None = None  # a folder with the published files


def audit(rebuild: Artifact, options: Options, progress: Callable[[Iterable], Iterable] = iter) -> Iterator[Finding]:
    """One finding per check. progress wraps the steps that are trained again. Call numerics.prepare() first."""
    if rebuild.bundle:
        yield lock.check_bundle(rebuild, rebuild.bundle)
    yield lock.check_pipeline(rebuild)
    yield lock.check_parameters(rebuild)
    yield lock.check_links(rebuild)
    yield lock.check_outputs(rebuild)
    if rebuild.bundle and rebuild.bundle.left_out:
        yield lock.check_left_out(rebuild)
    yield lock_inputs.check_code(rebuild)
    yield lock_inputs.check_libraries(rebuild)
    yield lock_inputs.check_pins(rebuild)
    yield lock_inputs.check_data(rebuild, options.data)
    yield lock_records.check_records(rebuild)
    if rebuild.lock.keys() - rebuild.records.keys() - rebuild.unreadable.keys():
        yield lock_records.check_unrecorded(rebuild)
    yield lock_records.check_unchanged_during_run(rebuild)
    yield lock_records.check_signature(rebuild, options.key)
    yield lock_records.check_stage_links(rebuild)
    yield chain.check_dataset(rebuild)
    yield chain.check_order(rebuild)
    finding, journal = chain.check_journal(rebuild)
    yield finding
    yield chain.check_trained_parameters(rebuild, journal)
    yield chain.check_visits(rebuild, journal)
    yield chain.check_base(rebuild, journal)
    yield chain.check_lokr(rebuild, journal)
    yield training_states.check_final_weights(rebuild, journal)
    yield training_states.check_saved_states(rebuild, journal)
    yield from release.check_release(rebuild, options.published)
    yield fidelity.check_quirks(rebuild)
    yield fidelity.check_untrained_layer(rebuild)
    if options.stages:
        yield from replay_stages.replay_stages(rebuild, options.own)
    yield replay_training.check_training(rebuild, journal, options.own, options.replay, options.seed, progress)
