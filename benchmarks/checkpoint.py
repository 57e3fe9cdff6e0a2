"""Merge and bake against cp, sd-mecha and LyCORIS: the same files in the same run, each tool as a whole process, from a
cold page cache until its output is on the disk.

Run `make bench-checkpoint`, or `python benchmarks/checkpoint.py`; `--scale 0.4` takes a sixth of the size and a minute
or two. The first run makes three checkpoints and a LoKr file (benchmarks/synthetic_checkpoints.py, 22 GB at scale 1).
Rounds alternate between `cp` of one checkpoint, merge and bake; the figures are medians. sd-mecha runs in its own
environment with this one's torch, with its default threads and with none. LyCORIS merges into a model in memory, in
float32 like bake. Merge and bake also run with other piece sizes and numbers of threads, which must give one hash.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent / "src"))

import click

import competitor_env
from kohaku_delta.formats.hashing import hash_file
from kohaku_delta.verify import compare_tensors

SD_MECHA = (
    "sd-mecha==1.1.8",
    "fuzzywuzzy==0.18.0",
    "levenshtein==0.27.5",
    "python-levenshtein==0.27.5",
    "rapidfuzz==3.14.6",
    "scipy==1.17.1",
)
OTHERS = ((1 << 14, 1), (1 << 20, 3))  # piece sizes and threads beside the default


def evict(paths: list[Path]) -> None:
    """Remove files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list, inputs: list[Path], out: Path, log: Path) -> tuple[float, float, str]:
    """Seconds until `out` is on the disk, the process's peak MiB, and its last line. Raises CalledProcessError."""
    out.unlink(missing_ok=True)
    evict(inputs)
    with open(log, "w+") as output, open(log.with_suffix(".err"), "w") as errors:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, f"see {errors.name}")
        with open(out, "rb") as file:
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        output.seek(0)
        return seconds, used.ru_maxrss / 1024, (output.read().splitlines() or [""])[-1]


def equal_tensors(ours: Path, theirs: Path) -> str:
    compared = compare_tensors.compare_files(ours, theirs)
    equal = compared.tensors - len(compared.differences) - len(compared.other_shape)
    return f"{equal:,} of {compared.tensors:,} tensors equal, bit for bit"


@click.command()
@click.option("--scale", default=1.0, show_default=True, help="Of SDXL's widths; the files' size goes with its square.")
@click.option("--rounds", default=3, show_default=True, help="Of cp, merge and bake; medians count.")
@click.option("--others/--no-others", default=True, show_default=True, help="Run sd-mecha and LyCORIS too.")
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default="work/bench",
    show_default=True,
    help="Files, environments and figures.",
)
def main(scale: float, rounds: int, others: bool, seed: int, work: Path) -> None:
    """Speed, memory and hashes of merge and bake against cp, sd-mecha and LyCORIS."""
    work = work.resolve()
    folder = work / f"checkpoint-{scale:g}-{seed}"
    out, theirs = folder / "out.safetensors", folder / "theirs.safetensors"
    files = {name: folder / f"{name}.safetensors" for name in ("sdxl", "gamma", "beta", "lokr")}
    needed = int(5.2 * 6.95e9 * max(scale, 0.1) ** 2)
    if not (folder / "parameters").is_file():
        work.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(work).free) < needed:
            raise click.ClickException(
                f"{needed >> 20:,} MiB are needed in {work}; {free >> 20:,} MiB are free. Choose a smaller --scale, or "
                "another folder with --work."
            )
        click.echo(f"making {needed * 22 // 36 >> 30} GiB of files in {folder} …")
        subprocess.run(
            [sys.executable, HERE / "synthetic_checkpoints.py", folder, "--scale", str(scale), "--seed", str(seed)],
            check=True,
        )
    figures: dict = {
        "scale": scale,
        "seed": seed,
        "bytes": files["gamma"].stat().st_size,
        "lokr_parameters": int((folder / "parameters").read_text()),
    }
    merged, baked = (
        [sys.executable, HERE / "run_ours.py", "merge", folder, out],
        [sys.executable, HERE / "run_ours.py", "bake", folder, out],
    )
    parents, trained = [files[name] for name in ("sdxl", "gamma", "beta")], [files["gamma"], files["lokr"]]
    runs: dict[str, list[tuple[float, float, str]]] = {"cp": [], "merge": [], "bake": []}

    def show(what: str, run: tuple[float, float, str], more: str = "") -> None:
        click.echo(f"{what:42} {run[0]:7.1f} s {run[1]:8,.0f} MiB  {more or run[2][:16]}")

    for _ in range(rounds):
        for what, command, inputs in (
            ("cp", ["cp", "--reflink=never", "--sparse=never", files["gamma"], out], [files["gamma"]]),
            ("merge", merged, parents),
            ("bake", baked, trained),
        ):
            runs[what].append(timed(command, inputs, out, folder / "log"))
            show(what, runs[what][-1])
    hashes = {what: {run[2] for run in runs[what]} for what in ("merge", "bake")}
    for numbers, threads in OTHERS:
        for what, command, inputs in (("merge", merged, parents), ("bake", baked, trained)):
            run = timed([*command, "--numbers", numbers, "--threads", threads], inputs, out, folder / "log")
            show(f"{what}, pieces of {numbers:,}, threads {threads}", run)
            hashes[what].add(run[2])
    seconds = {what: statistics.median(run[0] for run in runs[what]) for what in runs}
    figures |= {f"{what}_seconds": round(value, 1) for what, value in seconds.items()}
    figures |= {f"{what}_peak_mib": round(max(run[1] for run in runs[what])) for what in ("merge", "bake")}
    figures |= {f"{what}_distinct_hashes": len(hashes[what]) for what in hashes} | {
        "merge_time_ratio_cp": round(seconds["merge"] / seconds["cp"], 2)
    }
    python = competitor_env.ensure_venv(work / "sd-mecha", "sd-mecha", SD_MECHA, borrowing=True) if others else None
    if python:
        command = [python, HERE / "run_sd_mecha.py", files["gamma"], files["beta"], theirs]
        found = []
        for threads in (None, None, 0):
            run = timed(
                [*command, *(("--threads", threads) if threads is not None else ())],
                parents[1:],
                theirs,
                folder / "log",
            )
            found.append((run[0], hash_file(theirs)))
            show(f"sd-mecha, {'default threads' if threads is None else f'threads {threads}'}", run, found[-1][1][:16])
        figures["merge_speed_ratio_sd_mecha"] = round(min(each[0] for each in found) / seconds["merge"], 2)
        figures["sd_mecha_seconds"], figures["sd_mecha_distinct_hashes"] = (
            round(min(each[0] for each in found), 1),
            len({each[1] for each in found}),
        )
        timed(merged, parents, out, folder / "log")
        click.echo(f"merge and sd-mecha: {equal_tensors(out, theirs)} (ours has the donor's four embeddings)")
    if others:
        found = []
        for dtype in ("float32", "float16"):
            run = timed(
                [sys.executable, HERE / "run_lycoris.py", files["gamma"], files["lokr"], theirs, "--dtype", dtype],
                trained,
                theirs,
                folder / "log",
            )
            found.append(run)
            show(f"LyCORIS, {dtype}", run, run[2])
            if dtype == "float32":
                timed(baked, trained, out, folder / "log")
                click.echo(f"bake and LyCORIS in fp32: {equal_tensors(out, theirs)}")
        figures |= {
            "bake_speed_ratio_lycoris": round(found[0][0] / seconds["bake"], 2),
            "bake_speed_ratio_lycoris_fp16": round(found[1][0] / seconds["bake"], 2),
        }
        figures |= {"lycoris_seconds": round(found[0][0], 1), "lycoris_peak_mib": round(found[0][1])}
    for path in (out, theirs):
        path.unlink(missing_ok=True)
    (work / "checkpoint.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo("\n".join(f"{key}: {value}" for key, value in figures.items()) + f"\n→ {work / 'checkpoint.json'}")


if __name__ == "__main__":
    main()
