"""Fuzzing: the audit of any bundle ends with a verdict or with a sentence and exit code 2; never with a traceback, a
hang, much memory, or a character that controls the terminal.

Run `python benchmarks/fuzz_bundles.py --seconds 300`. Each case changes one member of an honest bundle of the tests'
small rebuild (rebuild_factory): bytes, a value of a JSON or YAML file, a column of a table; half of them are then
listed anew in bundle.json. Seed and count repeat a run; a case that breaks the promise is kept in --work.
"""

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent / "src"), str(HERE.parent / "tests" / "helpers")]

from kohaku_delta import numerics

numerics.prepare()  # before torch is imported

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from click.testing import CliRunner

import fuzz
import rebuild_factory
from kohaku_delta.cli import exit_codes
from kohaku_delta.cli.main import main as command
from kohaku_delta.provenance import bundles

SECONDS, MEBIBYTES = 30, 1500  # bounds of a case; an honest audit takes one second and 100 MiB
ODD = (
    None, True, -1, 0, 1 << 31, 1 << 62, 1 << 63, 1 << 80, 0.5, float("nan"), float("inf"), 1e300, "", "x" * 100_000,
    "\x1b[2J\r\n\u202e", "../secret", "/dev/zero", "0" * 32, "0" * 64, [], {}, [None], [[]], {"": None}, "\x00",
    [0] * 5000, "2020-01-01",
)  # fmt: skip
YAMLS = (
    "2020-01-01", "!!set {a, b}", "!!binary aGVsbG8=", "{[1, 2]: 3}", "{1: 3, a: 4}", "~", "[" * 2000, "&a [*a]",
    "!!omap [a: 1]", '!!int ""', "0x" + "f" * 20_000, "9" * 20_000, ".nan", '"\\ud800"', "!!timestamp 3", "? ", "- ",
)  # fmt: skip


def places(value, path=()):
    """The place of every value in a tree of mappings and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(content, chance: random.Random):
    """The tree with one odd value, or without one key, or with one more."""
    *outer, last = chance.choice([path for path in places(content) if path] or [(0,)])
    inner = content
    for key in outer:
        inner = inner[key]
    kind = chance.randrange(8)
    if kind == 0:
        del inner[last]
    elif kind == 1 and isinstance(inner, dict):
        inner[chance.choice(("more", "\x1b[2J", "../x", ""))] = chance.choice(ODD)
    elif kind == 2 and isinstance(inner, list):
        inner.append(chance.choice(ODD))
    else:
        inner[last] = chance.choice(ODD)
    return content


def changed_table(path: Path, chance: random.Random) -> None:
    """The table with a column of another type, a null, other rows or without metadata."""
    table = pq.read_table(path)
    number = chance.randrange(table.num_columns)
    name, column, kind = table.column_names[number], table.column(number), chance.randrange(6)
    if kind == 0:
        table = table.set_column(number, name, pa.nulls(table.num_rows, column.type))
    elif kind == 1:
        odd = chance.choice(([None], ["x"], [[1]], [1 << 62], [{"a": 1}], [b"\xff"], [-1]))
        table = table.set_column(number, name, pa.array(odd * table.num_rows))
    elif kind == 2:
        table = table.drop_columns([name])
    elif kind == 3:
        table = table.take(np.array([chance.randrange(len(table)) for _ in range(chance.choice((0, 1, 100)))], int))
    elif kind == 4:
        header = chance.choice(({}, {"kohaku_delta": "[" * 5000}, {"kohaku_delta": "{}"}, {"lokr": "\x1b"}))
        table = table.replace_schema_metadata(header)
    else:
        values = column.to_pylist()
        place = chance.randrange(len(values) or 1)
        values[place : place + 1] = [[None] if isinstance(column.type, pa.ListType) else None]
        table = table.set_column(number, name, pa.array(values, column.type))
    pq.write_table(table, path)


def change(folder: Path, name: str, chance: random.Random) -> None:
    path = folder / name
    content = path.read_bytes()
    if name.endswith(".parquet") and chance.random() < 0.7:
        changed_table(path, chance)
    elif name.endswith(".json") and content.startswith((b"{", b"[")) and chance.random() < 0.7:
        path.write_text(json.dumps(changed(json.loads(content), chance)))
    elif path.suffix in (".yaml", ".lock") and chance.random() < 0.4:
        path.write_text(yaml.dump(changed(rebuild_factory.loaded(path), chance), None, yaml.CSafeDumper))
    elif path.suffix in (".yaml", ".lock") and chance.random() < 0.7:
        lines = content.decode().splitlines()
        place = chance.randrange(len(lines))
        lines[place] = lines[place].split(":")[0] + ": " + chance.choice(YAMLS)
        path.write_text("\n".join(lines))
    else:
        path.write_bytes(fuzz.mutate(content, chance))


def seal(folder: Path) -> None:
    """bundle.json written anew."""
    left_out = json.loads((folder / bundles.MANIFEST).read_bytes())["left_out"]
    (folder / bundles.MANIFEST).unlink()
    bundles.write_manifest(folder, left_out)


def judge(target: Path, honest: Path, compared: bool) -> str:
    """Audit one target, or compare it with the honest one; return the exit code. Raises what breaks the promise."""
    began = time.monotonic()
    arguments = ["compare", honest, target] if compared else ["audit", target]
    done = CliRunner().invoke(command, list(map(str, arguments)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 1, 2), done.exit_code
    assert exit_codes.UNFORESEEN not in done.output, done.output
    assert all(line.isprintable() for line in done.output.split("\n")), repr(done.output)
    assert time.monotonic() - began < SECONDS, f"{arguments[0]} took {time.monotonic() - began:.0f} s"
    return f"{arguments[0]}s with exit code {done.exit_code}"


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="How long.")
@click.option("--seed", default=1, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="work/fuzz", show_default=True)
def main(seconds: float, seed: int, work: Path) -> None:
    """Audit changed bundles until the time is up."""
    chance, counts, broken, turn = random.Random(seed), Counter(), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        recipe = rebuild_factory.write(Path(temporary) / "made" / "recipe")
        honest, case = Path(temporary) / "honest", Path(temporary) / "case"
        CliRunner().invoke(command, ["bundle", str(honest), "--recipe", str(recipe)], catch_exceptions=False)
        done = CliRunner().invoke(command, ["audit", str(honest)])
        assert done.exit_code == 0, done.output
        names = sorted(path.relative_to(honest).as_posix() for path in honest.rglob("*") if path.is_file())
        names += [name for name in names if not name.startswith(("requirements/", "build/samples", "build/code"))] * 4
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            turn += 1
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(honest, case)
            name = chance.choice(names)
            try:
                change(case, name, chance)
                if name != bundles.MANIFEST and chance.random() < 0.5:
                    seal(case)
            except (ValueError, TypeError, KeyError, IndexError, yaml.YAMLError, pa.ArrowException):
                counts["changes that could not be written"] += 1
                continue
            try:
                counts[judge(case, honest, turn % 4 == 0)] += 1
            except Exception as fault:
                kept = work / f"bundle-{seed}-{turn}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(case, kept)
                broken.append(f"case {turn:,}, {name}: {type(fault).__name__}: {str(fault)[-600:]}. Kept as {kept}")
                click.echo(ascii(broken[-1]))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    told = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
    click.echo(
        f"{turn:,} bundles in {seconds:g} s, seed {seed}: {told}; {len(broken)} broke the promise; {grown:.0f} MiB"
    )
    if broken or grown > MEBIBYTES:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
