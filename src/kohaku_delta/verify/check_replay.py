"""The checks replay/<stage>, steps and losses: parts of the pipeline are computed again.

A stage's own script is run on what the rebuild says it read, and must write the same bytes. Steps of the training are
drawn by the auditor's seed, which nobody could foresee when the journal was handed over, and must give its rows.
"""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from kohaku_delta import numerics, params, paths
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.params import Recipe
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.provenance.artifact import REPOSITORY, Artifact
from kohaku_delta.training.journal import Journal
from kohaku_delta.verify import replay_training
from kohaku_delta.verify.check_chain import require_journal
from kohaku_delta.verify.findings import Check, Finding, Skip, check
from kohaku_delta.verify.replay_training import Files, Step
from kohaku_delta.yaml_file import read_yaml

Progress = Callable[[Iterable[Step]], Iterable[Step]]

# stage → the files and folders of build/ that it reads and writes, by option; training is replayed further below
STAGES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "select": ({"inputs": "inputs.json"}, {"out": "selection.parquet"}),
    "filter": (
        {"inputs": "inputs.json", "selection": "selection.parquet"},
        {"out": "posts.parquet", "dropped": "dropped.parquet"},
    ),
    "caption": (
        {"inputs": "inputs.json", "posts": "posts.parquet"},
        {"out": "captions.parquet", "artists": "artists-kxl-delta.json", "characters": "characters-kxl-delta.json"},
    ),
    "merge": ({"inputs": "inputs.json"}, {"out": "delta-base.safetensors"}),
    "schedule": ({"posts": "posts.parquet"}, {"out": "schedule.parquet", "buckets": "bucket.txt"}),
    "bake": (
        {"base": "delta-base.safetensors", "lokr": "delta-lokr.safetensors"},
        {"out": "kohaku-xl-delta.safetensors"},
    ),
    "export": ({"inputs": "inputs.json", "model": "kohaku-xl-delta.safetensors"}, {"out": "diffusers"}),
    "statistics": (
        {
            "inputs": "inputs.json",
            "artists": "artists-kxl-delta.json",
            "characters": "characters-kxl-delta.json",
            "buckets": "bucket.txt",
            **{name: f"{name}.parquet" for name in ("selection", "posts", "dropped", "captions")},
        },
        {"out": "dataset.json", "pictures": "statistics"},
    ),
    "preview": (
        {
            "inputs": "inputs.json",
            "selection": "selection.parquet",
            "base": "delta-base.safetensors",
            "model": "kohaku-xl-delta.safetensors",
        },
        {"out": "preview.png", "samples": "samples", "held-out": "held-out.json"},
    ),
    "milestones": (
        {
            "inputs": "inputs.json",
            "selection": "selection.parquet",
            "base": "delta-base.safetensors",
            "milestones": "milestones",
            "lokr": "delta-lokr.safetensors",
        },
        {"out": "milestones.csv", "grid": "milestones.png"},
    ),
}
DRAWING = ("preview", "milestones")  # compute with the model, on train.device


def option_for(stage: str) -> list[str]:
    """The option of the audit that computes this stage's outputs again; empty if there is none."""
    return ["--stages"] if stage in STAGES else ["--replay"] if stage == "train" else []


def replay_stages(rebuild: Artifact, own: Path | None) -> Iterator[Finding]:
    """One finding per stage. own: a recipe's folder that has what a bundle lacks (inputs, base)."""
    for name, (_, writes) in STAGES.items():
        outputs = (f"{paths.BUILD}/{file}" for file in writes.values())
        yield check(f"replay/{name}", *outputs)(replay_stage)(rebuild, name, own or rebuild.folder)


def replay_stage(rebuild: Artifact, name: str, own: Path) -> Check:
    """The stage's script, run into a temporary folder, writes files with the recorded sha256."""
    reads, writes = STAGES[name]
    record = rebuild.records.get(name)
    known = {path: out.sha256 for path, out in record.outputs.items()} if record else {}
    known |= {path: digest.sha256 for path, digest in rebuild.digests.items()}
    expected = {file: known[f"build/{file}"] for file in writes.values() if f"build/{file}" in known}
    if not expected:
        raise Skip("nothing says what it wrote")
    if name in DRAWING and (differing := numerics_differences(rebuild)):
        raise Skip(f"this host differs from the trainer's in {', '.join(differing)}, so bits cannot be compared")
    found = {}
    for option, file in reads.items():
        # the paths in inputs.json are relative to its own folder, so it is read where the inputs are
        folders = [own] if file == "inputs.json" else [rebuild.folder, own]
        found[option] = next(
            (folder / "build" / file for folder in folders if (folder / "build" / file).exists()), None
        )
    if missing := [reads[option] for option, path in found.items() if path is None]:
        raise Skip(f"{', '.join(missing)} does not exist")
    temporary_folder = partial(tempfile.TemporaryDirectory, prefix="kohaku-delta-")
    with temporary_folder() as temporary, temporary_folder() as recipe:  # in the recipe's folder nothing may be written
        arguments = [f"--params={_write_params(rebuild, own, Path(recipe))}"]
        arguments += [f"--{option}={path.resolve()}" for option, path in found.items() if path]
        arguments += [f"--{option}={Path(temporary, file)}" for option, file in writes.items()]
        script = REPOSITORY / "stages" / f"{name}.py"
        run = subprocess.run(
            [sys.executable, str(script), *arguments], cwd=temporary, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise Skip(f"could not be computed again: {' '.join(run.stderr.split())[-300:]}")
        for file, sha256 in expected.items():
            if hashing.digest_path(Path(temporary, file), md5=False).sha256 != sha256:
                yield f"computed again, {file} has other bytes"
    return f"computed again: the same bytes ({', '.join(expected)})"


def _write_params(rebuild: Artifact, own: Path, folder: Path) -> Path:
    """The rebuild's params.yaml for a stage that runs here: where its files lie and how many processors it takes is
    decided by the auditor, so download.mirror and execution are not the target's.
    """
    values = copy.deepcopy(rebuild.values)
    values["download"]["mirror"] = "mirror"  # beside this params.yaml: inputs.json says where the inputs are
    if own != rebuild.folder:
        values["execution"] = read_yaml(own / dvc_yaml.PARAMS)["execution"]
    path = folder / dvc_yaml.PARAMS
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    return path


def _local_recipe(rebuild: Artifact, own: Path) -> Recipe:
    """The rebuild's recipe with the execution of the auditor's own folder, which says where the states lie there."""
    if own == rebuild.folder:
        return rebuild.recipe
    return rebuild.recipe.model_copy(update={"execution": params.load(own / dvc_yaml.PARAMS).execution})


def check_training(
    rebuild: Artifact, journal: Journal | None, own: Path | None, count: int | None, seed: int, progress: Progress
) -> Finding:
    """replay/steps: `count` steps, drawn by `seed`, computed again; or replay/losses on hardware that cannot give the
    same bits. own: a recipe's folder with inputs, base and states; progress: wraps the steps to show progress.
    """
    if journal and count and (folder := own or (None if rebuild.bundle else rebuild.folder)):
        sampled = min(count, len(journal.rows))
        if differing := numerics_differences(rebuild):
            return check("replay/losses")(_check_losses)(rebuild, folder, sampled, seed, differing)
        return check("replay/steps", paths.JOURNAL)(_check_steps)(rebuild, journal, folder, sampled, seed, progress)
    return check("replay/steps", paths.JOURNAL)(_nothing_replayed)(rebuild, journal, count)


def _nothing_replayed(rebuild: Artifact, journal: Journal | None, count: int | None) -> str:
    if not count:
        raise Skip("no step was computed again: --replay N --seed S draws N of them")
    require_journal(journal)
    raise Skip("a bundle holds no weights and no images: name your own recipe folder, with inputs and base, with --own")


def numerics_differences(rebuild: Artifact) -> list[str]:
    """The facts of the numerics contract in which this host differs from what the train stage recorded."""
    device = rebuild.recipe.train.device
    try:
        numerics.enforce(device)
        here = numerics.describe(device)
    except UserError:
        return ["device"]
    record = rebuild.records.get("train")
    recorded = dict(record.numerics or {}) if record else {}
    if "python" in recorded:  # records of earlier versions name its patch release
        recorded["python"] = ".".join(recorded["python"].split(".")[:2])
    return sorted(key for key, value in recorded.items() if here.get(key) != value)


def _files(rebuild: Artifact, own: Path) -> Files:
    """What a replay reads: the rebuild's dataset, schedule and journal; inputs and base of the folder `own`."""
    tables = {"posts": paths.POSTS, "captions": paths.CAPTIONS, "schedule": paths.SCHEDULE, "journal": paths.JOURNAL}
    files: Files = {name: rebuild.folder / path for name, path in tables.items()}
    files |= {"inputs": own / paths.INPUTS, "base": own / paths.BASE}
    return files | {"tars": None, "tokenizer": None, "tokenizer_2": None}


def _work_folder(recipe: Recipe, rebuild: Artifact, own: Path) -> Path:
    """Raises Skip for a target whose states are outside of it."""
    if own == rebuild.folder and rebuild.work is None:
        raise Skip("execution.work is outside the recipe's folder: the states there are not read")
    return own / recipe.execution.work


def _check_steps(rebuild: Artifact, journal: Journal, own: Path, count: int, seed: int, progress: Progress) -> Check:
    computed = 0
    try:
        for step, difference in progress(
            _replay_sample(rebuild, journal, own, replay_training.sample_steps(len(journal.rows), count, seed))
        ):
            computed += 1
            if difference:
                yield f"step {step}: {difference}"
                return ""
    except UserError as error:
        raise Skip(f"could not be computed: {error.message}") from None
    return (
        f"{count} steps drawn with seed {seed} and the {computed - count} on the way to them were computed again: bit "
        f"for bit. {replay_training.confidence(count, len(journal.rows))}"
    )


def _replay_sample(rebuild: Artifact, journal: Journal, own: Path, sample: list[int]) -> Iterator[Step]:
    """Every step that is computed to reach the sampled ones, until one differs. Steps after one state are computed in
    one go.
    """
    recipe = _local_recipe(rebuild, own)
    work = _work_folder(recipe, rebuild, own)
    by_state: dict[tuple[Path, int], list[int]] = {}
    for step in sample:
        by_state.setdefault(replay_training.nearest_state(work, journal, step), []).append(step)
    for steps in by_state.values():
        for step, difference in replay_training.replay_steps(recipe, _files(rebuild, own), work, steps[0], steps[-1]):
            yield step, difference
            if difference:
                return


def _check_losses(rebuild: Artifact, own: Path, count: int, seed: int, differing: list[str]) -> Check:
    """Losses alone, after one milestone that the seed picks: the weaker evidence."""
    reason = f"this host differs from the trainer's in {', '.join(differing)}, so bits cannot be compared"
    recipe = _local_recipe(rebuild, own)
    milestones = sorted(_work_folder(recipe, rebuild, own).glob("*/delta-lokr-step*.safetensors"))
    if not milestones:
        raise Skip(f"{reason}; and there is no milestone's LoKr file to compute losses from")
    milestone = milestones[replay_training.sample_steps(len(milestones), 1, seed)[0]]
    try:
        step, pairs = replay_training.compare_losses(recipe, _files(rebuild, own), milestone, "cpu", count, seed)
    except UserError as error:
        raise Skip(f"could not be computed: {error.message}") from None
    distance = replay_training.rms_relative_error(pairs)
    sentence = (
        f"{reason}; losses alone, which is weaker evidence (that these weights give these losses, not how they came "
        f"about): {len(pairs)} of step {step} are {distance:.1e} off, relative"
    )
    if not distance <= replay_training.TOLERANCE:  # a loss that is not a number is no equal one
        yield sentence
    return sentence
