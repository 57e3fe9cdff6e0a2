"""The recipe at its real size on a machine without a GPU: all stages, one after another, on synthetic inputs.

Run `make rehearsal`, or one part: `make rehearsal REHEARSAL=train`; `--recipe pilot` rehearses the pilot. It needs two
cores, 24 GB of memory, 60 GB of disk and no network. What is replaced stands in rehearsal/replacements.yaml and is
printed. Parts that are done are kept in figures.json and not run again: a stopped rehearsal goes on where it was.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import click
import numpy as np
from ruamel.yaml import YAML
from safetensors import safe_open

import synthetic_inputs
from kohaku_delta import atomic_files, params, paths
from kohaku_delta.errors import UserError
from kohaku_delta.hub import pins
from kohaku_delta.preflight import estimates, parameter_counts
from kohaku_delta.provenance import dvc_yaml
from kohaku_delta.sdxl.tensor_names import PREFIX
from kohaku_delta.training import journal
from kohaku_delta.training.run_folders import state_path
from kohaku_delta.units import format_size

GB = 10**9
DISK, MEMORY = 60 * GB, 20 * GB
KILLED_AFTER = 150  # seconds: the base is loaded, and the step takes minutes
JOURNAL_STEPS, JOURNAL_TENSORS = 28_638, 1314  # of the release
# What of a part carries over to a host with GPUs, and what does not.
CARRIES_OVER = {
    "download": "all, but the network: files lie in the mirror",
    "select": "all",
    "filter": "all, but the time: pictures of 64 × 64 decode in no time, real ones take 48 core hours",
    "caption": "all",
    "merge": "all",
    "schedule": "all, but buckets (one of 97)",
    "train": "names, shapes, memory of weights and states, journal; not speed, not the numbers of CUDA, not its memory",
    "resume": "the files of a state, and the order of saving",
    "journal": "all",
    "bake": "all",
    "export": "all",
    "statistics": "all",
    "preview": "the code; not speed, not the pictures (random weights)",
    "milestones": "the code; not speed, not the pictures",
    "tensors": "all",
    "audit": "all",
    "report": "all",
    "bundle": "all",
}


def flattened(content: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every value that is no mapping."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def replace(content: dict, dotted: str, value: object) -> object:
    """Sets a value and returns the old one. Raises UserError for a key that the recipe does not have."""
    *outer, last = dotted.split(".")
    section = content
    for key in outer:
        section = section.get(key) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        raise UserError(f"rehearsal/replacements.yaml replaces {dotted}, which the recipe does not have.")
    old, section[last] = section[last], value
    return old


def write_recipe(recipe_folder: Path, folder: Path) -> None:
    """params.yaml, dvc.yaml and lists of pins of the rehearsal, for inputs that are there; prints what is replaced."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    content = yaml.load(recipe_folder / "params.yaml")
    replaced = [("root", replace(content, "root", os.path.relpath(ROOT, folder)))]
    for dotted, value in flattened(YAML(typ="safe").load(ROOT / "rehearsal" / "replacements.yaml")):
        replaced.append((dotted, replace(content, dotted, value)))
    recipe = params.load(recipe_folder / "params.yaml")
    files = list(synthetic_inputs.mirror_files(recipe, folder.parent / "mirror", folder))
    click.echo("hashing the inputs")
    found = synthetic_inputs.hashes(files, folder / "hashes.json")
    for name, pinned in content["download"]["inputs"].items():
        for place, pin in enumerate(pinned if isinstance(pinned, list) else [pinned]):
            own = [path for other, each, path in files if other == name and each.url == pin["url"]]
            if not own:  # the recipe does not read it
                continue
            replaced += [(f"download.inputs.{name}.{key}", pin[key]) for key in ("bytes", "sha256")]
            pin["url"] = synthetic_inputs.with_revision(pin["url"])
            pin["bytes"], pin["sha256"] = found[own[0]]
            if pins.SPAN.search(pin["url"]):
                listed = pins.format_pin_list([(path.name, *found[path]) for path in own])
                paths.pin_list_path(folder, name, place).write_bytes(listed)
                pin["bytes"], pin["sha256"] = sum(found[path][0] for path in own), hashlib.sha256(listed).hexdigest()
    values = dict(flattened(content)) | {"root": content["root"], "published": content["published"]}
    lines = [
        f"{dotted}: {json.dumps(old)} → {json.dumps(values[dotted])}"
        if dotted in values
        else f"{dotted}: synthetic file"
        for dotted, old in replaced
    ]
    head = f"A rehearsal of {os.path.relpath(recipe_folder, ROOT)}/params.yaml: synthetic inputs, and\n  "
    content.yaml_set_start_comment(head + "\n  ".join(lines))
    click.echo(head + "\n  ".join(lines))
    yaml.dump(content, folder / "params.yaml")
    shutil.copyfile(recipe_folder / "dvc.yaml", folder / "dvc.yaml")


def begin(recipe_folder: Path, folder: Path) -> None:
    """Makes the inputs and the recipe in `folder`, which becomes a DVC repository of its own."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < MEMORY:
        raise UserError(
            f"A rehearsal needs {format_size(MEMORY)} of main memory (a training step at full size); this machine has "
            f"{format_size(memory)}. Run it on a larger one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(file.stat().st_blocks * 512 for file in folder.parent.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + present < DISK:
        raise UserError(
            f"A rehearsal needs {format_size(DISK)} of disk in {folder.parent}; {format_size(free)} are free. "
            "Free some space, or choose another folder with --folder."
        )
    recipe = params.load(recipe_folder / "params.yaml")
    files = list(synthetic_inputs.mirror_files(recipe, folder.parent / "mirror", folder))
    synthetic_inputs.make_inputs(files, folder.parent / "scratch")
    (folder / recipe.supplied).mkdir(exist_ok=True)
    write_recipe(recipe_folder, folder)
    if not (folder / ".dvc").is_dir():
        for command in (["init", "--no-scm", "--quiet"], ["config", "cache.type", "hardlink,symlink"]):
            subprocess.run(["dvc", *command], cwd=folder, check=True)


def run_measured(command: list[str], folder: Path, kill_after: float | None = None) -> tuple[float, int]:
    """Seconds of a command, and bytes at the peak of the largest of its processes (resident, mapped files included).
    kill_after: seconds until SIGKILL of all its processes. Raises UserError if it fails.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    try:
        if kill_after:
            time.sleep(kill_after)
            os.killpg(process.pid, signal.SIGKILL)
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not kill_after:
        raise UserError(f"`{' '.join(command)}` failed in {folder} (exit code {process.returncode}); see above.")
    return time.monotonic() - began, used.ru_maxrss * 1024


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


def run_stage(folder: Path, name: str) -> dict:
    """One stage by `dvc repro`."""
    seconds, peak = run_measured(["dvc", "repro", "--quiet", name], folder)
    written = sum(size_of(folder / out) for out in dvc_yaml.stage_declarations(folder)[name].outs)
    written += size_of(folder / "work") if name == "train" else 0
    return {"seconds": seconds, "peak": peak, "written": written}


def rehearse_resume(folder: Path) -> dict:
    """The training again from its first saved state, killed by SIGKILL in the second step and started once more: every
    output and the last state must have the bytes of the training that ran through.
    """
    through = next(path.parent for path in (folder / "work").glob("*/depends.json"))
    other = folder / "resume"
    shutil.rmtree(other, ignore_errors=True)
    run = other / "work" / through.name
    run.mkdir(parents=True)
    for path in (through / "depends.json", state_path(through, 1)):
        shutil.copytree(path, run / path.name) if path.is_dir() else shutil.copyfile(path, run / path.name)
    outs = {"--out": paths.LOKR, "--milestones": paths.MILESTONES, "--journal": paths.JOURNAL, "--curves": paths.CURVES}
    command = [sys.executable, str(ROOT / "stages" / "train.py"), "--work", str(other / "work")]
    command += [text for option, out in outs.items() for text in (option, str(other / Path(out).name))]
    run_measured(command, folder, KILLED_AFTER)
    if state_path(run, 2).is_dir():
        raise UserError(f"The step ended before it was killed: {KILLED_AFTER} s is too long for this machine.")
    seconds, peak = run_measured(command, folder)
    pairs = [(folder / out, other / Path(out).name) for out in outs.values()] + [
        (state_path(through, 2), state_path(run, 2))
    ]
    for a, b in pairs:
        for file in sorted(a.rglob("*")) if a.is_dir() else [a]:
            twin = b / file.relative_to(a)
            if file.is_file() and (not twin.is_file() or digest(file) != digest(twin)):
                raise UserError(f"{twin} of the killed and resumed training differs from {file}.")
    written = size_of(other)
    shutil.rmtree(other)
    return {"seconds": seconds, "peak": peak, "written": written}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rehearse_journal(folder: Path) -> dict:
    """A journal of the release's length, with its number of tensors and lanes: appended, saved with a state, written
    and read.
    """
    numbers = np.random.default_rng(0)
    path, states = folder / "journal.parquet", folder / "journal-of-states"
    milestone = params.load(ROOT / "params.yaml").train.milestone_every
    shutil.rmtree(states, ignore_errors=True)
    began = time.monotonic()
    rows = journal.Journal({"rehearsal": "of the release's length"})
    for step in range(JOURNAL_STEPS):
        rows.append(
            {
                "step": step,
                "visits": "0" * 64,
                "losses": numbers.random(32).tolist(),
                "lanes": numbers.integers(0, 2**63, 8).tolist(),
                "gradient_norm": 1.0,
                "learning_rate_unet": 4e-5,
                "learning_rate_text": 1e-5,
                "scale": 65536.0,
                "weights": int(numbers.integers(0, 2**63)),
                "optimizer": 1,
                "tensors": numbers.bytes(JOURNAL_TENSORS),
            }
        )
    times = [time.monotonic() - began]
    for state in ("before", "last"):
        (states / state).mkdir(parents=True)
        began = time.monotonic()
        rows.write_parts(states / state / path.name, milestone)
        times.append(time.monotonic() - began)
        rows.saved = states / state / path.name
    own = sum(file.stat().st_size for file in rows.saved.iterdir() if file.stat().st_nlink == 1)
    for work in (lambda: rows.write(path), lambda: journal.read_journal(path)):
        began = time.monotonic()
        work()
        times.append(time.monotonic() - began)
    append, _, save, write, read = times
    written = path.stat().st_size
    click.echo(
        f"journal of {JOURNAL_STEPS:,} steps: {append:.1f} s to append all, {save:.2f} s to save with a state "
        f"({own:,} of {written:,} bytes), {write:.1f} s to write, {read:.1f} s to read"
    )
    path.unlink()
    shutil.rmtree(states)
    return {"seconds": sum(times), "peak": None, "written": written}


def rehearse_tensors(folder: Path) -> dict:
    """The LoKr's names in the key maps of ComfyUI and WebUI, and the final file against the diffusers folder."""
    with safe_open(folder / paths.BASE, "np") as file:
        names = list(file.keys())
    with safe_open(folder / paths.LOKR, "np") as file:
        modules = {name.rsplit(".", 1)[0] for name in file.keys()}  # noqa: SIM118
    known = {
        "lora_unet_" + name.removeprefix(PREFIX["unet"]).rsplit(".", 1)[0].replace(".", "_")
        for name in names
        if name.startswith(PREFIX["unet"])
    }
    parts = [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    for encoder, layers in (("te1", 12), ("te2", 32)):
        known |= {
            f"lora_{encoder}_text_model_encoder_layers_{layer}_{part}" for layer in range(layers) for part in parts
        }
    if unknown := sorted(modules - known):
        raise UserError(
            f"ComfyUI and WebUI would not find {len(unknown)} modules of the LoKr: {', '.join(unknown[:3])}."
        )
    click.echo(f"all {len(modules):,} modules of the LoKr have names that ComfyUI and WebUI map")
    return run_command(folder, "tensors", paths.FINAL, paths.DIFFUSERS)


def run_command(folder: Path, *arguments: str) -> dict:
    """One of our own commands that must succeed."""
    seconds, peak = run_measured([sys.executable, "-m", "kohaku_delta", *arguments], folder)
    return {"seconds": seconds, "peak": peak, "written": 0}


def rehearse_report(folder: Path) -> dict:
    """Model card and page."""
    run_command(folder, "card", ".")
    return run_command(folder, "report", ".") | {"written": size_of(folder / "build" / "report.html")}


def rehearse_bundle(folder: Path) -> dict:
    """A bundle, and its audit."""
    bundle = folder / "bundle.tar"
    bundle.unlink(missing_ok=True)
    made = run_command(folder, "bundle", str(bundle))
    run_command(folder, "audit", str(bundle))
    return made | {"written": size_of(bundle)}


PARTS: dict[str, Callable[[Path], dict]] = {
    "resume": rehearse_resume,
    "journal": rehearse_journal,
    "tensors": rehearse_tensors,
    "audit": lambda folder: run_command(folder, "audit", ".", "--data", "--stages"),
    "report": rehearse_report,
    "bundle": rehearse_bundle,
}


def print_table(figures: dict[str, dict]) -> None:
    """Every part that was run, and the plan beside what was measured."""
    click.echo(f"\n{'part':<11} {'time':>8} {'peak memory':>12} {'written':>9}  carries over to a host with GPUs")
    for name, row in figures.items():
        peak = format_size(row["peak"]) if row["peak"] else ""
        took = str(timedelta(seconds=round(row["seconds"])))
        click.echo(f"{name:<11} {took:>8} {peak:>12} {format_size(row['written']):>9}  {CARRIES_OVER.get(name, 'all')}")
    click.echo(f"in all {timedelta(seconds=round(sum(row['seconds'] for row in figures.values())))}")


def print_plan(figures: dict[str, dict], folder: Path) -> None:
    """What preflight planned beside what was measured."""
    recipe = params.load(folder / "params.yaml")
    model = parameter_counts.count_parameters(recipe, folder)
    if model is None or "train" not in figures:
        return
    sizes = [each for each in estimates.build_sizes(recipe, model) if each.bytes is not None]
    made = [paths.BASE, paths.FINAL, paths.DIFFUSERS, paths.LOKR, paths.JOURNAL, paths.MILESTONES]
    rows = [
        ("memory of the training", estimates.host_memory(recipe, model), figures["train"]["peak"]),
        ("base, final, diffusers, LoKrs", estimates.total(sizes), sum(size_of(folder / out) for out in made)),
        ("work", estimates.total(estimates.state_sizes(recipe, model)), size_of(folder / "work")),
    ]
    click.echo(f"\n{'plan of preflight':<30} {'planned':>9} {'measured':>9}")
    for name, planned, measured in rows:
        click.echo(f"{name:<30} {format_size(planned):>9} {format_size(measured):>9}")


@click.command()
@click.argument("parts", nargs=-1)
@click.option(
    "--recipe", "recipe_name", default=".", show_default=True, help="The recipe that is rehearsed: its folder."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=ROOT / "work" / "rehearsal",
    help="Where inputs and builds lie.  [default: work/rehearsal]",
)
def main(parts: tuple[str, ...], recipe_name: str, folder: Path) -> None:
    """Rehearse a recipe at its real size without a GPU: PARTS of it (stages and checks), or what was not run yet."""
    recipe_folder = (ROOT / recipe_name).resolve()
    if not (recipe_folder / "params.yaml").is_file():
        raise UserError(f"{recipe_folder} has no params.yaml. Name the folder of a recipe with --recipe.")
    own = folder.resolve() / ("release" if recipe_folder == ROOT else recipe_folder.name)
    stages = {name: partial(run_stage, name=name) for name in dvc_yaml.stage_declarations(recipe_folder)}
    order = list(stages)
    order.insert(order.index("train") + 1, "resume")
    works = {name: (stages | PARTS)[name] for name in order} | PARTS
    if unknown := sorted(set(parts) - works.keys()):
        raise UserError(f"{', '.join(unknown)} is no part of a rehearsal. The parts are {', '.join(works)}.")
    begin(recipe_folder, own)
    record = own / "figures.json"
    figures = json.loads(record.read_text()) if record.is_file() else {}
    for name, work in works.items():
        if name not in parts and (parts or name in figures):
            continue
        click.echo(f"\n— {name} —")
        figures[name] = work(own)
        with atomic_files.atomic_write(record, "w") as file:
            json.dump(figures, file, indent=1)
    print_table({name: figures[name] for name in works if name in figures})
    print_plan(figures, own)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error.message}") from None
