"""An audit of a rebuild: all checks, in the order of their lines.

A check GROUP/name is in the module check_GROUP. Exceptions: more lock/* checks are in check_lock_inputs,
check_lock_records and check_training_states (lock/work); chain/stages is in check_lock_records, chain/weights and
chain/milestones in check_training_states, chain/samples, preview and progress in check_preview; chain/selection,
captions, statistics, curves, final, diffusers and card in check_outputs.
"""

from collections.abc import Iterator
from pathlib import Path

from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.verify import (
    check_chain,
    check_fidelity,
    check_lock,
    check_lock_inputs,
    check_lock_records,
    check_outputs,
    check_preview,
    check_release,
    check_training_states,
    findings,
)
from kohaku_delta.verify import check_replay as replays
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
        yield check_lock.check_bundle(rebuild, rebuild.bundle)
    yield check_lock.check_pipeline(rebuild)
    yield check_lock.check_parameters(rebuild)
    yield check_lock.check_links(rebuild)
    yield check_lock.check_outputs(rebuild)
    if rebuild.bundle and rebuild.bundle.left_out:
        yield check_lock.check_left_out(rebuild)
    yield (code := check_lock_inputs.check_code(rebuild))
    yield check_lock_inputs.check_libraries(rebuild)
    yield check_lock_inputs.check_loaded(rebuild)
    yield check_lock_inputs.check_pins(rebuild)
    yield check_lock_inputs.check_data(rebuild, data)
    yield check_lock_records.check_records(rebuild)
    if rebuild.lock.keys() - rebuild.records.keys() - rebuild.unreadable.keys():
        yield check_lock_records.check_unrecorded(rebuild)
    yield check_lock_records.check_unchanged_during_run(rebuild)
    yield check_lock_records.check_revision(rebuild, code)
    yield check_lock_records.check_confinement(rebuild)
    yield check_lock_records.check_signature(rebuild, key)
    yield check_lock_records.check_stage_links(rebuild)
    yield check_outputs.check_selection(rebuild, own)
    yield check_chain.check_dataset(rebuild)
    yield check_outputs.check_captions(rebuild, own)
    yield check_chain.check_order(rebuild)
    yield check_outputs.check_statistics(rebuild, own)
    finding, journal = check_chain.check_journal(rebuild)
    yield finding
    yield check_chain.check_trained_parameters(rebuild, journal)
    yield check_chain.check_visits(rebuild, journal)
    yield check_chain.check_numbers(rebuild, journal)
    yield check_chain.check_base(rebuild, journal)
    yield check_chain.check_lokr(rebuild, journal)
    yield check_training_states.check_final_weights(rebuild, journal)
    yield check_training_states.check_milestones(rebuild, journal)
    yield check_training_states.check_saved_states(rebuild, journal)
    yield check_outputs.check_curves(rebuild, journal)
    yield check_outputs.check_final(rebuild)
    yield check_outputs.check_diffusers(rebuild)
    yield check_preview.check_samples(rebuild)
    yield check_preview.check_sheet(rebuild, own)
    yield check_preview.check_progress(rebuild, journal)
    if rebuild.output(check_outputs.CARD):
        yield check_outputs.check_card(rebuild)
    yield from check_release.check_release(rebuild, published)
    yield check_fidelity.check_quirks(rebuild)
    yield check_fidelity.check_untrained_layer(rebuild)
    if stages:
        yield from replays.replay_stages(rebuild, own)
    yield replays.check_training(rebuild, journal, own, replay, seed or 0, progress)


def describe_unseen(rebuild: Artifact, made: list[Finding]) -> str:
    """The outputs that were neither computed again nor compared with what they were made of, each group with what would
    look at it; "" if there are none.
    """
    groups: dict[str, list[str]] = {}
    for out in findings.not_looked_at(made, rebuild.writers):
        skipped = [f"{each.group}/{each.name}" for each in made if each.status == findings.SKIP and out in each.outputs]
        remedy = "; ".join([f"{name} was not made" for name in skipped] + replays.option_for(rebuild.writers[out]))
        groups.setdefault(remedy or "no option looks at it", []).append(out)
    return "; ".join(f"{', '.join(outs)} ({remedy})" for remedy, outs in groups.items())
