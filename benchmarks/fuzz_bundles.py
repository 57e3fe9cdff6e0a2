"""Fuzzing: the audit of any target ends with a verdict or with a sentence and exit code 2; never with a traceback, a
hang, much memory, or a character that controls the terminal.

Run `python benchmarks/fuzz_bundles.py --seconds 300`. Each case changes one file of an honest rebuild of the tests
(rebuild_factory), which is a bundle's folder, a bundle's tar or a recipe's folder with its weights: bytes; a value,
the nesting or a double key of JSON and YAML; a column of a table or the end of its file; a chunk of a PNG; the header
of a safetensors file; the members of the tar. Half of them are then listed anew (bundle.json; dvc.lock and records).
Seed and count repeat a run; a case that breaks the promise is kept in --work.
"""

import json
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import zlib
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

SECONDS, MEBIBYTES = 30, 1500  # bounds of a case, of processor time; an honest audit takes one second and 100 MiB
HANG = 20 * SECONDS  # of time, on a busy machine too
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


def changed_text(text: str, chance: random.Random, opening: str, closing: str) -> str:
    """JSON or YAML whose text is changed: deep nesting, a key twice, a number that no tree of Python's would hold."""
    places = [place for place, letter in enumerate(text) if letter == ":"] or [0]
    place, kind = chance.choice(places) + 1, chance.randrange(5)
    if kind == 0:
        depth = chance.choice((10, 100, 900, 1100, 50_000))
        return text[:place] + " " + opening * depth + closing * chance.choice((0, depth)) + text[place:]
    if kind == 1:
        line = chance.choice(text.splitlines() or [""])
        return text.replace(line, line + ("" if line.endswith(",") else ",") + "\n" + line, 1)
    if kind == 2:
        odd = chance.choice(("9" * 5000, "1e999", "-0", "NaN", "Infinity", "1" * 30, '"\\ud800"', '"\\u0000"', "tru"))
        end = min((found for mark in ",}]\n" if (found := text.find(mark, place)) > 0), default=place)
        return text[:place] + " " + odd + text[end:]
    if kind == 3:
        return text[:place] + chance.choice(("\ufeff", "\x00", "\x1b[2J", "\u2028", " " * 100_000, "\r")) + text[place:]
    return text * 2


def changed_footer(content: bytes, chance: random.Random) -> bytes:
    """A Parquet file with another byte, a run of bytes or another length in its footer."""
    length = int.from_bytes(content[-8:-4], "little")
    footer, data = bytearray(content[-8 - length : -8]), content[: -8 - length]
    for _ in range(chance.choice((1, 1, 2, 4))):
        place, kind = chance.randrange(len(footer)), chance.randrange(4)
        if kind == 0:
            footer[place] = chance.randrange(256)
        elif kind == 1:  # a long number
            footer[place : place + 5] = b"\xff\xff\xff\xff" + bytes([chance.choice((0x0F, 0x7F, 0xFF))])
        elif kind == 2:
            del footer[place : place + chance.choice((1, 4, 30))]
        else:
            footer[place:place] = footer[place : place + chance.choice((1, 8, 200))]
    told = chance.choice((len(footer), len(footer), len(footer), 0, length + 1, 1 << 31, (1 << 32) - 1))
    return data + bytes(footer) + told.to_bytes(4, "little") + b"PAR1"


def changed_picture(content: bytes, chance: random.Random) -> bytes:
    """A PNG with a changed chunk and a true checksum."""
    chunks, place = [], 8
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += length + 12
    number, kind = chance.randrange(len(chunks)), chance.randrange(6)
    name, body = chunks[number]
    if kind == 0:
        sides = chance.choice(((0, 0), (1, 1 << 30), (1 << 16, 1 << 16), (-1, -1)))
        chunks[0] = (b"IHDR", struct.pack(">ii", *sides) + chunks[0][1][8:])
    elif kind == 1:
        header = bytearray(chunks[0][1])
        header[chance.randrange(8, 13)] = chance.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunks[0] = (b"IHDR", bytes(header))
    elif kind == 2:
        bomb = zlib.compress(bytes(chance.choice((1 << 10, 1 << 26))), 9)
        kinds = (b"zTXtparameters\0\0", b"iTXtparameters\0\1\0\0\0", b"iCCPx\0\0", b"IDAT")
        told = chance.choice(kinds)
        chunks.insert(1, (told[:4], told[4:] + bomb))
    elif kind == 3:
        evil = chance.choice((b"\x1b[2J", b"\xff\xfe", "\u202e".encode(), b"x" * 2_000_000, b""))
        chunks.insert(1, (chance.choice((b"tEXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"PLTE", b"tRNS")), evil))
    elif kind == 4:
        chunks[number] = (name, fuzz.mutate(body, chance))
    else:
        chunks[number : number + 1] = chunks[number : number + 1] * chance.choice((0, 2, 500))
    return content[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def changed_weights(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a changed header whose length is true."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].decode(), content[8 + length :]
    if chance.random() < 0.7:
        header = json.dumps(changed(json.loads(header), chance))
    else:
        header = changed_text(header, chance, "[", "]")
    told = header.encode(errors="surrogatepass")
    return len(told).to_bytes(8, "little") + told + data


def change(folder: Path, name: str, chance: random.Random) -> None:
    path = folder / name
    content, luck = path.read_bytes(), chance.random()
    is_json, is_yaml = content.startswith((b"{", b"[")) and name.endswith(".json"), path.suffix in (".yaml", ".lock")
    if name.endswith(".parquet") and luck < 0.5:
        changed_table(path, chance)
    elif name.endswith(".parquet") and luck < 0.9:
        path.write_bytes(changed_footer(content, chance))
    elif name.endswith(".png") and content.startswith(b"\x89PNG") and luck < 0.9:
        path.write_bytes(changed_picture(content, chance))
    elif name.endswith(".safetensors") and content[8:9] == b"{" and luck < 0.7:
        path.write_bytes(changed_weights(content, chance))
    elif (is_json or is_yaml) and luck < 0.3:
        path.write_text(changed_text(content.decode(), chance, *chance.choice(("[]", ("{a: ", "}"), ('{"a":', "}")))))
    elif is_json and luck < 0.8:
        path.write_text(json.dumps(changed(json.loads(content), chance)))
    elif is_yaml and luck < 0.55:
        path.write_text(yaml.dump(changed(rebuild_factory.loaded(path), chance), None, yaml.CSafeDumper))
    elif is_yaml and luck < 0.85:
        lines = content.decode().splitlines()
        place = chance.randrange(len(lines))
        lines[place] = lines[place].split(":")[0] + ": " + chance.choice(YAMLS)
        path.write_text("\n".join(lines))
    else:
        path.write_bytes(fuzz.mutate(content, chance))


def pack(folder: Path, out: Path, chance: random.Random) -> None:
    """The bundle as a tar whose members were changed: one twice, of another kind, name or size, or a broken header."""
    with open(out, "wb") as file:
        bundles.pack_bundle(folder, file)
    with tarfile.open(out) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    number, kind = chance.randrange(len(members)), chance.randrange(7)
    member, data = members[number]
    if kind == 0:
        other = chance.choice(members)[1]
        members.insert(chance.randrange(len(members) + 1), (member, other + b" " * (member.size - len(other))))
    elif kind == 1:
        member.type = chance.choice((*tarfile.SUPPORTED_TYPES, b"?", b"Z"))
        member.linkname = chance.choice(("", "../secret", "/etc/passwd", "build"))
    elif kind == 2:
        parts = (
            "..",
            "",
            "\x1b[2J",
            "a" * 300,
            "a/b/c/d/e",
            "\udcff",
            "build/\u202e",
            "/etc/passwd",
            member.name + "/x",
        )
        member.name = chance.choice((chance.choice(parts), f"build/{chance.choice(parts)}"))
    elif kind == 3:
        key = chance.choice(("path", "size", "linkpath", "GNU.sparse.realsize", "hdrcharset", "mtime"))
        odd = chance.choice(("-1", "x", "9" * 400, "1e999", "../secret", "0", "x" * 2_000_000))
        member.pax_headers = {key: odd}
    if kind < 4:
        with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as tar:
            for each, content in members:
                header = each.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
                tar.fileobj.write(header + content + bytes(-len(content) % 512))
                tar.offset += len(header) + len(content) + -len(content) % 512
        return
    whole = bytearray(out.read_bytes())
    if kind == 4:  # a header with a true checksum
        start = chance.choice(
            [place for place in range(0, len(whole), 512) if whole[place + 257 : place + 262] == b"ustar"]
        )
        field, width = chance.choice(
            ((0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155))
        )
        odd = chance.choice((b"\xff" * width, b"\x80" + b"\x7f" * (width - 1), b"7" * width, b"-1", bytes(width), b"x"))
        whole[start + field : start + field + width] = odd[:width].ljust(width, b"\0")
        whole[start + 148 : start + 156] = b" " * 8
        whole[start + 148 : start + 156] = b"%06o\0 " % sum(whole[start : start + 512])
    elif kind == 5:
        del whole[chance.randrange(len(whole)) :]
    else:
        place = chance.randrange(0, len(whole), 512)
        whole[place : place + 512] = whole[place : place + 512] * chance.choice((0, 2, 50))
    out.write_bytes(whole)


def seal(folder: Path) -> None:
    """bundle.json, or dvc.lock and the records, written anew."""
    if not (folder / bundles.MANIFEST).exists():
        rebuild_factory.lock(folder)
        rebuild_factory.records(folder)
        return
    left_out = json.loads((folder / bundles.MANIFEST).read_bytes())["left_out"]
    (folder / bundles.MANIFEST).unlink()
    bundles.write_manifest(folder, left_out)


def judge(target: Path, honest: Path, compared: bool, what: str) -> str:
    """Audit one target, or compare it with the honest one; return the exit code. Raises what breaks the promise."""
    began, clock = time.process_time(), time.monotonic()
    arguments = ["compare", honest, target] if compared else ["audit", target]
    done = CliRunner().invoke(command, list(map(str, arguments)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 1, 2), done.exit_code
    assert exit_codes.UNFORESEEN not in done.output, done.output
    assert all(line.isprintable() for line in done.output.split("\n")), repr(done.output)
    took = time.process_time() - began
    assert took < SECONDS and time.monotonic() - clock < HANG, f"{arguments[0]} took {took:.0f} s"
    return f"{what}: {'compared' if compared else 'audited'} with exit code {done.exit_code}"


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="How long.")
@click.option("--seed", default=1, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="work/fuzz", show_default=True)
def main(seconds: float, seed: int, work: Path) -> None:
    """Audit changed rebuilds until the time is up."""
    chance, counts, broken, turn, slowest = random.Random(seed), Counter(), [], 0, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        recipe = rebuild_factory.write(Path(temporary) / "made" / "recipe")
        honest, tar = Path(temporary) / "honest", Path(temporary) / "case.tar"
        CliRunner().invoke(command, ["bundle", str(honest), "--recipe", str(recipe)], catch_exceptions=False)
        for whole in (honest, recipe):
            done = CliRunner().invoke(command, ["audit", str(whole)])
            assert done.exit_code == 0, done.output
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            turn += 1
            what = chance.choice(("folder of a bundle", "folder of a bundle", "tar of a bundle", "folder of a recipe"))
            original = recipe if what == "folder of a recipe" else honest
            case = Path(temporary) / "case" / "recipe"  # as deep as the honest one: params.yaml names the code by `..`
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(original, case)
            name = chance.choice(likely_names(original))
            try:
                if what != "tar of a bundle" or chance.random() < 0.3:
                    change(case, name, chance)
                if name != bundles.MANIFEST and chance.random() < 0.5:
                    seal(case)
                if what == "tar of a bundle":
                    pack(case, tar, chance)
            except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error, yaml.YAMLError,
                    pa.ArrowException, RecursionError, OSError):  # fmt: skip
                counts["changes that could not be written"] += 1
                continue
            target, began = tar if what == "tar of a bundle" else case, time.process_time()
            try:
                counts[judge(target, original, turn % 4 == 0, what)] += 1
            except Exception as fault:
                kept = work / f"{what.split()[0]}-{seed}-{turn}"
                work.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(case, kept) if target == case else shutil.copy(tar, kept)
                broken.append(f"case {turn:,}, {name}: {type(fault).__name__}: {str(fault)[-600:]}. Kept as {kept}")
                click.echo(ascii(broken[-1]))
            slowest = max(slowest, time.process_time() - began)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for what, count in sorted(counts.items()):
        click.echo(f"{count:8,} {what}")
    click.echo(
        f"{turn:,} cases in {seconds:g} s, seed {seed}: {len(broken)} broke the promise; the slowest took "
        f"{slowest:.1f} s of processor time; {grown:.0f} MiB more than for an honest audit"
    )
    if broken or grown > MEBIBYTES:
        raise SystemExit(1)


def likely_names(folder: Path) -> list[str]:
    """The files of a target, with those that are read more closely several times."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return names + [name for name in names if not name.startswith(("requirements/", "build/code", "mirror/"))] * 4


if __name__ == "__main__":
    main()
