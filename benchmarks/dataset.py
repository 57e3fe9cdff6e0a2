"""Measures select + filter + caption against HakuBooru: speed, memory, and equality of the results, in one run on the
same database, tars, seed and ranges.

Run: `make bench-dataset`, or `python benchmarks/dataset.py --posts 200000 --posts 1000000`. For each size a
collection is made (benchmarks/synthetic_danbooru.py), then the three stages run on it, timed as a whole process.
HakuBooru runs at the largest size up to --hakubooru (half a million posts take it a quarter of an hour and 8 GB), in
an environment of its own that is made on the first run; ids and captions are compared post for post. Each ends with
what a trainer can read: HakuBooru with an image and a text file per post, ours with tables that say where in the tars
each image is. Without its files HakuBooru runs with --spare-files. The release's ranges are kept, with draws in
proportion to the size.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import pyarrow.parquet as pq
from ruamel.yaml import YAML

import competitor_env
import synthetic_danbooru

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "hakubooru==0.0.2",
    "peewee==3.17.1",
    "python-dateutil==2.8.2",
    "webdataset==0.2.86",
    "tqdm",
)  # of the release's time, or nearest to it
BYTES_PER_POST = 3600  # of a collection
RUNS = 3  # of ours; the median counts. HakuBooru runs once: its minutes vary less
RELEASE = 7_100_000  # posts that the release's draws belong to


def recipe(posts: int, seed: int, folder: Path) -> tuple[Path, list[dict]]:
    """The release's params.yaml with its draws in proportion and without decoding, and its ranges."""
    yaml = YAML()
    content = yaml.load(HERE.parent / "params.yaml")
    for part in content["selection"]["ranges"]:
        if part["draw"] != "all":
            part["draw"] = max(1, part["draw"] * posts // RELEASE)
    content["selection"]["seed"] = seed
    content["filter"]["image_check"] = "header"  # HakuBooru decodes no image
    yaml.dump(content, folder / "params.yaml")
    return folder / "params.yaml", [dict(part) for part in content["selection"]["ranges"]]


def run_timed(command: list, log: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a whole process. Raises CalledProcessError."""
    os.sync()  # what was written before is not this one's cost
    with open(log, "w") as file:
        started = time.perf_counter()
        process = subprocess.Popen([str(each) for each in command], stdout=file, cwd=log.parent)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, used.ru_maxrss / 1024


def compare(theirs: Path, ours: Path) -> tuple[bool, int]:
    """Whether ids and captions are equal, post for post, and how many posts HakuBooru wrote."""
    table = pq.read_table(ours, columns=["post_id", "caption"])
    with open(theirs, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    equal = [post for post, _ in lines] == table["post_id"].to_pylist() and [text for _, text in lines] == table[
        "caption"
    ].to_pylist()
    return equal, len(lines)


@click.command()
@click.option(
    "--posts",
    "sizes",
    type=int,
    multiple=True,
    default=(200_000, 500_000, 1_000_000, 7_100_000),
    show_default=True,
    help="Sizes of collections; repeat it.",
)
@click.option(
    "--hakubooru",
    "largest",
    default=500_000,
    show_default=True,
    help="HakuBooru runs at the largest size up to this; 0 for not at all.",
)
@click.option("--spare-files", is_flag=True, help="HakuBooru keeps captions in memory and writes no file for a post.")
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default="work/bench",
    show_default=True,
    help="Collections, environments and figures.",
)
def main(sizes: tuple[int, ...], largest: int, spare_files: bool, seed: int, work: Path) -> None:
    """Speed, memory and equality of select + filter + caption against HakuBooru."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    keys = (
        "speed_ratio_hakubooru",
        "peak_mib",
        "peak_mib_hakubooru",
        "posts",
        "captions",
        "captions_equal",
        "seconds_hakubooru",
    )
    figures = dict.fromkeys(keys) | {"seed": seed, "hakubooru_writes_files": not spare_files}
    opposed = max((size for size in sizes if size <= largest), default=None)
    python = competitor_env.ensure_venv(work / "hakubooru", "HakuBooru", PACKAGES) if opposed else None
    for size in sorted(set(sizes)):
        folder = work / f"{size}-{seed}"
        made = folder / "made.json"
        if not made.is_file():
            free = shutil.disk_usage(work).free
            if free < size * BYTES_PER_POST:
                raise click.ClickException(
                    f"A collection of {size:,} posts needs {size * BYTES_PER_POST >> 20:,} MiB in {work}; "
                    f"{free >> 20:,} MiB are free. Choose fewer posts."
                )
            pairs = synthetic_danbooru.write(folder, size, seed, later=False)
            made.write_text(json.dumps({"pairs": pairs}))
        pairs = json.loads(made.read_text())["pairs"]
        params, ranges = recipe(size, seed, folder)
        out = folder / "out"
        took = []
        for _ in range(RUNS):
            (folder / "images.members.parquet").unlink(missing_ok=True)  # the index of the tars is made in every run
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            took.append(
                run_timed([sys.executable, HERE / "run_dataset_stages.py", params, folder, out], folder / "stages.log")
            )
        seconds, peak = statistics.median(each for each, _ in took), max(each for _, each in took)
        figures |= {f"seconds_{size}": round(seconds, 2), f"peak_mib_{size}": round(peak)}
        captions = pq.read_metadata(out / "captions.parquet").num_rows
        each = ", ".join(f"{seconds:.2f}" for seconds, _ in took)
        click.echo(
            f"{size:>9,} posts, {pairs:>11,} tag pairs: ours {seconds:8.2f} s (median of {each}), {peak:6,.0f} MiB, "
            f"{captions:,} captions"
        )
        if python is None or size != opposed:
            continue
        command = [
            python,
            HERE / "run_hakubooru.py",
            "--database",
            folder / "danbooru2023.db",
            "--tars",
            folder / "images",
            "--seed",
            seed,
            "--ranges",
            json.dumps(ranges),
        ]
        files = out / "hakubooru"
        command += [] if spare_files else ["--files", files]
        slow, much = run_timed([*command, "--out", out / "hakubooru.jsonl"], folder / "hakubooru.log")
        shutil.rmtree(files, ignore_errors=True)
        equal, count = compare(out / "hakubooru.jsonl", out / "captions.parquet")
        values = (round(slow / seconds, 1), round(peak), round(much), size, count, equal, round(slow, 2))
        figures |= dict(zip(keys, values, strict=True))
        click.echo(
            f"{'':9} HakuBooru: {slow:.2f} s, {much:,.0f} MiB; ratio {slow / seconds:.1f}; "
            f"{count:,} ids and captions {'equal' if equal else 'NOT equal'}"
        )
    if figures["posts"] is None:
        figures |= {"posts": max(sizes), "peak_mib": figures[f"peak_mib_{max(sizes)}"]}
    (work / "dataset.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(f"→ {work / 'dataset.json'}")


if __name__ == "__main__":
    main()
