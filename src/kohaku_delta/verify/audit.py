"""An audit of a rebuild: all checks, in the order of their lines.

A check GROUP/name is in the module of its group: lock/* in lock, lock_inputs, lock_records and training_states
(lock/work); chain/* in chain, lock_records (chain/stages) and training_states (chain/weights); release/* in release;
fidelity/* in fidelity; replay/* in replay.
"""

from collections.abc import Iterator
from pathlib import Path

from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.verify import chain, fidelity, lock, lock_inputs, lock_records, release, training_states
from kohaku_delta.verify import replay as replays
from kohaku_delta.verify.findings import Finding


def audit(
    rebuild: Artifact,
    *,
    key: Path | None = None,
    data: bool = False,
    stages: bool = False,
    replay: int | None = None,
    seed: int | None = None,
    own: Path | None = None,
    published: Path | None = None,
    progress: replays.Progress = iter,
) -> Iterator[Finding]:
    """One finding per check. Call numerics.prepare() first.

    key: the signer's public key; data: hash the inputs; stages: run stages again; replay: train so many steps again,
    drawn by `seed`; own: a recipe's folder with what a bundle lacks; published: a folder with the published files;
    progress: wraps the steps that are trained again.
    """
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
    yield lock_inputs.check_data(rebuild, data)
    yield lock_records.check_records(rebuild)
    if rebuild.lock.keys() - rebuild.records.keys() - rebuild.unreadable.keys():
        yield lock_records.check_unrecorded(rebuild)
    yield lock_records.check_unchanged_during_run(rebuild)
    yield lock_records.check_signature(rebuild, key)
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
    yield from release.check_release(rebuild, published)
    yield fidelity.check_quirks(rebuild)
    yield fidelity.check_untrained_layer(rebuild)
    if stages:
        yield from replays.replay_stages(rebuild, own)
    yield replays.check_training(rebuild, journal, own, replay, seed or 0, progress)
