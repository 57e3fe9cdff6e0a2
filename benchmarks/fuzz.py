"""Fuzzing: reading any file ends with the tensors that safetensors reads too, or with a UserError; never with a crash
or with much memory.

Run `python benchmarks/fuzz.py --seconds 300`. Two targets take turns: `header`, mutated safetensors files; `lokr`,
well-formed files with odd LoKr entries, planned and loaded for a bake. Seed and count repeat a run; a case that breaks
the promise is kept in the folder of --work.
"""

import json
import logging
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent / "src"), str(HERE.parent / "tests" / "helpers")]

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers loads it; it warns about kernels not used here

import click
import numpy as np
from safetensors import safe_open

from kohaku_delta.errors import UserError
from kohaku_delta.formats import dtypes, safetensors_io
from kohaku_delta.weights import bake, lokr_format

TOKENS = (
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F16"', b'"BF16"', b'"F8_E4M3"', b'"F4"', b'"I64"',
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"null", b"true", b"-1", b"0", b"1e3", b"1.0", b"NaN", b"Infinity",
    b"18446744073709551615", b"18446744073709551616", b"9223372036854775807", b"4294967296", b"\\u0000", b"\\ud800",
    b"\xff", b"\xf0\x9f\x98\x80", b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}', b"[" * 2000,
    b'{"":' * 1500, b" " * 64, b"PK\x03\x04", b"\x80\x02",
)  # fmt: skip
LORAS = (
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_middle_block_1_proj_in",
    "lora_te2_text_model_encoder_layers_1_self_attn_k_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_out_0",
    "lora_te2_text_projection",
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_nowhere",
    "",
    "lora_unet_input_blocks_0_0",
)
SUFFIXES = (*(suffix for kind in lokr_format.KINDS.values() for suffix in kind), "lora_up.weight", "")
RIGHT = (
    (LORAS[0], (8, 8), (3, 3, 3, 3)), (LORAS[0], (4, 4), (6, 6, 3, 3)), (LORAS[1], (4, 4), (12, 12)),
    (LORAS[2], (2, 2), (32, 32)), (LORAS[3], (4, 4), (24, 12)), (LORAS[5], (8, 8), (8, 8)),
)  # fmt: skip
SIDES = (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 48, 64)


def whole_files(folder: Path) -> list[bytes]:
    """Well-formed files to start from."""
    files = []
    for metadata, arrays in (
        ({}, {}),
        ({"k": "v"}, {"a": np.zeros(2, np.float32)}),
        (
            {},
            {
                "b": np.zeros((3, 4), np.float16),
                "a": np.arange(5),
                "scalar": np.array(1.0),
                "empty": np.zeros((0, 4), np.float32),
                "é": np.zeros(3, np.uint8),
            },
        ),
        (
            {"format": "pt", "x": '\n"\\' * 20},
            {f"model.{i}.weight": np.zeros((i % 3 + 1, i % 5), np.int16) for i in range(20)},
        ),
    ):
        safetensors_io.save(folder / "whole", arrays, metadata)
        files.append((folder / "whole").read_bytes())
    return files


def mutate(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        place, kind = chance.randrange(len(data) + 1), chance.randrange(9)
        if kind == 0 and place < len(data):
            data[place] = chance.randrange(256)
        elif kind == 1:
            data[place:place] = chance.choice(TOKENS)
        elif kind == 2:
            del data[place : place + chance.choice((1, 1, 2, 8, 40))]
        elif kind == 3:
            token = chance.choice(TOKENS)
            data[place : place + len(token)] = token
        elif kind == 4:
            other = chance.randrange(len(data) + 1)
            data[place:place] = data[min(place, other) : max(place, other)][:4096]
        elif kind == 5:
            data[:8] = chance.choice(
                (0, 1, 2, 8, len(data), max(len(data) - 8, 0), 1 << 31, 1 << 63, (1 << 64) - 1)
            ).to_bytes(8, "little", signed=False)
        elif kind == 6:
            data.extend(bytes(chance.choice((1, 2, 4, 8, 100))))
        elif kind == 7 and len(data) > 8:  # keep the length field true to what now stands there
            end = data.rfind(b"}")
            data[:8] = max(end - 7, 0).to_bytes(8, "little")
        elif kind == 8 and len(data) > 16:
            digits = [i for i in range(8, len(data)) if 48 <= data[i] <= 57]
            if digits:
                data[chance.choice(digits)] = chance.randrange(48, 58)
    return bytes(data)


def built(chance: random.Random) -> bytes:
    """A file whose header is JSON and nearly right: one thing or none is wrong."""
    header, place = {}, 0
    for name in chance.sample(
        ("a", "b", "model.x", "é", "\u0000", "", "__metadata_", "a/b", '"', "x" * 300), chance.randrange(0, 5)
    ):
        dtype = chance.choice(dtypes.ORDER)
        shape = [chance.choice((0, 1, 2, 3, 7)) for _ in range(chance.randrange(0, 4))]
        end = place + int(np.prod(shape, dtype=int)) * dtypes.BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    if chance.random() < 0.4:
        header["__metadata__"] = {
            chance.choice(("format", "é", "")): chance.choice(("pt", "", "\n" * 9)) for _ in range(chance.randrange(3))
        }
    names = [name for name in header if name != "__metadata__"]
    if names and chance.random() < 0.6:
        entry = header[chance.choice(names)]
        odd = chance.choice(
            (
                -1,
                0,
                1,
                2,
                1 << 31,
                1 << 53,
                1 << 62,
                1 << 63,
                1 << 64,
                1 << 80,
                0.5,
                1e300,
                None,
                True,
                "1",
                [],
                {},
                [[1]],
            )
        )
        kind = chance.randrange(7)
        if kind == 0:
            entry["data_offsets"][chance.randrange(2)] = odd
        elif kind == 1:
            entry["shape"] = entry["shape"] + [odd]
        elif kind == 2:
            entry["dtype"] = chance.choice(("F4", "C64", "f16", "F16 ", odd))
        elif kind == 3:
            entry[chance.choice(("dtype", "shape", "data_offsets", "more"))] = odd
        elif kind == 4:
            del entry[chance.choice(tuple(entry))]
        elif kind == 5:
            header["__metadata__"] = chance.choice((odd, {"a": odd}))
        else:
            header[names[0]] = dict(header[names[-1]])
    text = json.dumps(header, ensure_ascii=chance.random() < 0.5).encode() + b" " * chance.choice((0, 0, 3, 8))
    return len(text).to_bytes(8, "little") + text + bytes(place + chance.choice((0, 0, 0, 0, 1, -1)) if place else 0)


def read(path: Path) -> str:
    """Read one file; return "read" or "refused". Raises what breaks the promise."""
    try:
        with safetensors_io.open_file(path) as file:
            ours = {
                name: (spec.dtype, list(spec.shape), file.read(name).tobytes()) for name, spec in file.specs.items()
            }
            metadata = file.metadata
    except UserError as refusal:
        assert len(refusal.message) < 2000 and path.name in refusal.message, refusal.message
        return "refused"
    with safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(ours) and (theirs.metadata() or {}) == metadata
        for name, (dtype, shape, content) in ours.items():
            part = theirs.get_slice(name)
            assert (part.get_dtype(), part.get_shape()) == (dtype, shape), name
            if dtype not in ("BF16", "F8_E4M3", "F8_E5M2"):
                assert theirs.get_tensor(name).tobytes() == content, name
    return "read"


def entries(chance: random.Random) -> dict[str, np.ndarray]:
    """LoKr tensors: one that fits, or odd ones, or both."""
    tensors = {}
    if chance.random() < 0.6:
        module, w1, w2 = chance.choice(RIGHT)
        tensors = {
            f"{module}.lokr_w1": np.ones(w1, np.float16),
            f"{module}.lokr_w2": np.ones(w2, np.float16),
            f"{module}.alpha": np.array(chance.choice((1, np.inf)), np.float16),
        }
        if chance.random() < 0.5:
            tensors[f"{module}.dora_scale"] = np.ones(
                chance.choice(((w1[0] * w2[0], *[1] * (len(w2) - 1)), (1, w1[1] * w2[1], *[1] * (len(w2) - 2)), (3,))),
                np.float16,
            )
    for _ in range(chance.randrange(0 if tensors else 1, 3)):
        module = chance.choice(LORAS)
        for suffix in chance.sample(SUFFIXES, chance.randrange(1, 6)):
            shape = [chance.choice(SIDES) for _ in range(chance.choice((0, 1, 2, 2, 2, 4)))]
            if np.prod(shape) < 1 << 14:
                kind = chance.choice((np.float16, np.float32, np.float64, np.int32))
                tensors[f"{module}.{suffix}"] = np.full(
                    shape, chance.choice((0, 1, 2) if kind == np.int32 else (0, 1, 0.5, np.inf, np.nan)), kind
                )
    return tensors or {"x.alpha": np.ones((), np.float16)}


def planned(model: safetensors_io.SafetensorsFile, path: Path) -> str:
    """Plan and load one LoKr file; return "planned" or "refused"."""
    try:
        with safetensors_io.open_file(path) as trained:
            for updates in bake.plan_updates(model, trained, force=True)[0].values():
                for update in updates:
                    loaded = bake.load_update(model, trained, update)
                    rows = loaded.delta.rows(0, loaded.shape[0])
                    assert rows.size == np.prod(loaded.shape) and rows.dtype == np.float32
    except UserError as refusal:
        assert len(refusal.message) < 2000, refusal.message
        return "refused"
    return "planned"


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="How long.")
@click.option("--seed", default=1, show_default=True)
@click.option("--target", type=click.Choice(["both", "header", "lokr"]), default="both", show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default="work/fuzz",
    show_default=True,
    help="Where a broken case is kept.",
)
def main(seconds: float, seed: int, target: str, work: Path) -> None:
    """Read malformed files until the time is up."""
    chance, counts = random.Random(seed), {}
    memory = Path("/dev/shm")  # where a flush costs nothing
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path, base = Path(folder) / "case.safetensors", Path(folder) / "base.safetensors"
        corpus = whole_files(Path(folder))
        import tiny_sdxl

        tiny_sdxl.write(base, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with safetensors_io.open_file(base) as model:
            ends, turn = time.monotonic() + seconds, 0
            while time.monotonic() < ends:
                turn += 1
                now = {"both": "header" if turn % 8 else "lokr"}.get(target, target)
                try:
                    if now == "header":
                        path.write_bytes(mutate(chance.choice(corpus), chance) if turn % 2 else built(chance))
                        result = read(path)
                        if result == "read" and path.stat().st_size < 4096 and chance.random() < 0.05:
                            corpus = corpus[-200:] + [path.read_bytes()]
                    else:
                        safetensors_io.save(path, entries(chance))
                        result = planned(model, path)
                except Exception as fault:
                    work.mkdir(parents=True, exist_ok=True)
                    (work / "broken.safetensors").write_bytes(path.read_bytes())
                    raise click.ClickException(
                        f"case {turn:,} of seed {seed} ({now}) ended with {type(fault).__name__}: {fault}. "
                        f"It is kept as {work / 'broken.safetensors'}."
                    ) from fault
                counts[now, result] = counts.get((now, result), 0) + 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    told = ", ".join(f"{count:,} {target} files {result}" for (target, result), count in sorted(counts.items()))
    click.echo(
        f"{turn:,} cases in {seconds:g} s, seed {seed}: {told}; no crash; {grown:.0f} MiB more than at the start"
    )
    if grown > 200:
        raise click.ClickException("The memory grew by more than 200 MiB.")


if __name__ == "__main__":
    main()
