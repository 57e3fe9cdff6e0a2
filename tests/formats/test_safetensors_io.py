"""Reading and writing safetensors: compared with the safetensors library, and with damaged and hostile files."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kohaku_delta.errors import UserError
from kohaku_delta.formats import safetensors_io
from kohaku_delta.formats.safetensors_header import TensorSpec

TENSORS = {
    "b": torch.arange(12).reshape(3, 4).half(),
    "a": torch.arange(5).float(),
    "Z": torch.tensor(3.0, dtype=torch.float64),
    "é": torch.arange(3),
    "c.bf": torch.arange(6).bfloat16(),
    "u": torch.arange(7).to(torch.uint8),
    "flag": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    **{
        str(dtype): torch.arange(3).to(dtype)
        for dtype in (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)
    },
    "8a": torch.ones(3).to(torch.float8_e4m3fn),
    "8b": torch.ones(5).to(torch.float8_e5m2),
}
BITS = {
    "c.bf": ("BF16", torch.int16),
    "8a": ("F8_E4M3", torch.uint8),
    "8b": ("F8_E5M2", torch.uint8),
}  # what numpy has no name for
SAVED = {name: (value.view(BITS[name][1]) if name in BITS else value).numpy() for name, value in TENSORS.items()}
DTYPES = {name: dtype for name, (dtype, _) in BITS.items()}


@pytest.mark.parametrize("metadata", [None, {"one": 'key "quoted" é\n'}])
def test_bytes_are_safetensors_own_where_it_is_deterministic(tmp_path, metadata):
    safetensors_io.save(tmp_path / "ours", SAVED, metadata, DTYPES)
    save_file(TENSORS, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_many_metadata_keys_give_the_same_bytes_in_any_order(tmp_path):
    keys = {f"key {i}": str(i) for i in range(20)}
    first = safetensors_io.save(tmp_path / "a", SAVED, keys, DTYPES)
    second = safetensors_io.save(tmp_path / "b", dict(reversed(SAVED.items())), dict(reversed(keys.items())), DTYPES)
    assert first == second and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == keys
    theirs = load_file(tmp_path / "a")
    assert all(torch.equal(theirs[name], value) for name, value in TENSORS.items())


def test_sha256_and_digest_come_on_the_way_and_digest_ignores_the_container(tmp_path):
    ours = safetensors_io.save(tmp_path / "a", SAVED, {"x": "1", "y": "2"}, DTYPES)
    assert ours.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest() and ours.bytes == os.path.getsize(
        tmp_path / "a"
    )
    save_file(TENSORS, tmp_path / "b", {"other": "header"})
    digests = set()
    for path in (tmp_path / "a", tmp_path / "b"):
        with safetensors_io.open_file(path) as file:
            digests.add(file.digest())
    assert digests == {ours.digest}
    for change in (
        {"a": TENSORS["a"] + 1},
        {"a": TENSORS["a"].reshape(5, 1)},
        {"a": TENSORS["a"].view(torch.int32)},
        {"new": TENSORS["a"].clone()},
    ):
        save_file(TENSORS | change, tmp_path / "b")
        with safetensors_io.open_file(tmp_path / "b") as file:
            assert file.digest() != ours.digest


def test_files_of_safetensors_read_back(tmp_path):
    save_file(TENSORS, tmp_path / "x", {"k": "v"})
    with safetensors_io.open_file(tmp_path / "x") as file:
        assert file.metadata == {"k": "v"} and list(file.specs) == sorted(TENSORS)
        for name, array in SAVED.items():
            assert file.specs[name].shape == array.shape and np.array_equal(
                file.read(name).reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8)
            )
            assert b"".join(file.iter_chunks(name, 8)) == array.tobytes()
        assert file.read_bytes("b", 4, 6) == SAVED["b"].tobytes()[4:10]
        assert (
            file.header_bytes()
            + b"".join(file.read_bytes(name) for name in sorted(SAVED, key=lambda name: file._offsets[name]))
            == (tmp_path / "x").read_bytes()
        )


def test_nothing_is_left_when_a_producer_fails_or_a_disk_is_full(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"before")

    def produce(order):
        yield "a", np.zeros(3, np.float32)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        safetensors_io.write(tmp_path / "x", {"a": TensorSpec("F32", (5,))}, produce)
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"before"


def test_a_disk_that_is_too_full_is_known_before_anything_is_computed(tmp_path, monkeypatch):
    def full(descriptor, start, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        safetensors_io.write(
            tmp_path / "x", {"a": TensorSpec("F32", (5,))}, lambda order: pytest.fail("it was computed")
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("pieces", [[("a", 4)], [("a", 6)], [("a", 5), ("b", 1)], [("b", 5)], []])
def test_pieces_that_are_not_what_was_announced_are_never_written(tmp_path, pieces):
    with pytest.raises(ValueError):
        safetensors_io.write(
            tmp_path / "x",
            {"a": TensorSpec("F32", (5,))},
            lambda order: [(name, np.zeros(count, np.float32)) for name, count in pieces],
        )
    assert os.listdir(tmp_path) == []


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    # 640 = 0x0280: the first bytes of the file are those of a pickle
    for padding in range(600):
        safetensors_io.save(tmp_path / "x", {"a": np.zeros(1)}, {"k": "v" * padding})
        if (tmp_path / "x").read_bytes()[:2] == b"\x80\x02":
            break
    with safetensors_io.open_file(tmp_path / "x") as file:
        assert file.header_bytes()[:8] == (640).to_bytes(8, "little") and file.metadata == {"k": "v" * padding}


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD = {
    "empty": (b"", "too few"),
    "pickle": (b"\x80\x02}q\x00.", "it is a pickle"),
    "zip": (b"PK\x03\x04" + bytes(50), "it is a pickle"),
    "header longer than the file": (file_of({}, length=10_000), "claims 10000 bytes and the file has 10"),
    "header of an absurd length": (struct.pack("<Q", 1 << 63) + bytes(8), "cut short or not safetensors"),
    "text": (b"hello, this is some text and no safetensors", "cut short or not safetensors"),
    "not JSON": (file_of(b"{ nonsense "), "not JSON"),
    "nested without end": (file_of(b'{"a":' + b"[" * 100_000), "not JSON"),
    "a list": (file_of([1]), "does not begin with"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "half a character": (file_of(b'{"\\ud800":%s}' % ONE, bytes(4)), "half of a surrogate pair"),
    "half a character in the metadata": (file_of(b'{"__metadata__":{"a":"\\udfff"}}'), "half of a surrogate pair"),
    "a name twice": (file_of(b'{"a":%s,"a":%s}' % (ONE, ONE), bytes(4)), "'a' twice"),
    "metadata twice": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "not a mapping of texts"),
    "metadata of nothing": (file_of({"__metadata__": None}), "not a mapping of texts"),
    "overlap": (file_of({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "overlap or leave a hole"),
    "partial overlap": (
        file_of({"a": entry(0, 8, shape=(2,)), "b": entry(4, 12, shape=(2,))}, bytes(12)),
        "overlap or leave a hole",
    ),
    "hole": (file_of({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "overlap or leave a hole"),
    "ends early": (file_of({"a": entry(0, 4)}, bytes(3)), "cut short"),
    "goes on": (file_of({"a": entry(0, 4)}, bytes(5)), "was added to"),
    "backwards": (file_of({"a": entry(4, 0)}, bytes(4)), "no proper offsets"),
    "negative": (file_of({"a": entry(-4, 0)}, bytes(4)), "no proper offsets"),
    "fraction": (file_of({"a": entry(0, 4.0)}, bytes(4)), "no proper offsets"),
    "beyond": (file_of({"a": entry(0, 1 << 70, shape=(1 << 68,))}), "no proper"),
    "unknown dtype": (file_of({"a": entry(0, 4, "F33")}, bytes(4)), "'F33', which is not known"),
    "dtype of a list": (file_of({"a": entry(0, 4, ["F32"])}, bytes(4)), "which is not known"),
    "other size": (file_of({"a": entry(0, 4, shape=(2,))}, bytes(4)), "is not what F32"),
    "absurd shape": (file_of({"a": entry(0, 4, shape=(1 << 62, 1 << 62, 4))}, bytes(4)), "no proper shape"),
    "absurd shape of nothing": (file_of({"a": entry(0, 0, shape=(0, 1 << 62))}), "no proper shape"),
    "many axes": (file_of({"a": entry(0, 4, shape=(1,) * 1000)}, bytes(4)), "no proper shape"),
    "boolean axis": (file_of({"a": entry(0, 4, shape=(True,))}, bytes(4)), "no proper shape"),
    "shape of a text": (
        file_of({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, bytes(4)),
        "no proper shape",
    ),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "does not hold exactly"),
    "more than asked": (file_of({"a": entry(0, 4) | {"code": "x"}}, bytes(4)), "does not hold exactly"),
    "an entry of text": (file_of({"a": "x"}), "does not hold exactly"),
    "a huge number": (
        file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "not JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_hostile_file_is_refused_in_a_sentence(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError) as refusal, safetensors_io.open_file(tmp_path / "bad.safetensors"):
        pass
    assert (
        reason in refusal.value.message
        and "bad.safetensors" in refusal.value.message
        and len(refusal.value.message) < 500
    )


def test_long_metadata_is_read_and_a_header_that_would_fill_the_memory_is_not(tmp_path):
    long = {"ss_tag_frequency": json.dumps({f'tag "{i}" [\\{{': i for i in range(400_000)})}
    safetensors_io.save(tmp_path / "x", {"a": np.zeros(1)}, long)
    with safetensors_io.open_file(tmp_path / "x") as file:
        assert file.metadata == long and file.size > 12 << 20
    (tmp_path / "y").write_bytes(file_of(b'{"a":[' + b"[]," * (5 << 20) + b"[]]}"))
    code = """if True:
        import sys
        sys.path.insert(0, "src")
        from kohaku_delta.formats import safetensors_io
        try:
            safetensors_io.open_file(sys.argv[1]).__enter__()
        except Exception as refusal:
            peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
            print(type(refusal).__name__, "outside of texts" in refusal.message, peak < 200 << 10)"""
    root = Path(__file__).resolve().parents[2]
    assert (
        subprocess.run([sys.executable, "-c", code, tmp_path / "y"], cwd=root, capture_output=True, text=True).stdout
        == "UserError True True\n"
    )


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=reason), safetensors_io.open_file(path):
            pass


WHOLE = file_of({"__metadata__": {"k": "v"}, "a": entry(0, 8, shape=(2,)), "b": entry(8, 12, "F16", (2, 1))}, bytes(12))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        VALUES.map(lambda value: file_of(value, bytes(12))),
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)),
    )
)
@example(WHOLE)
def test_fuzzed_headers_are_read_or_refused_as_safetensors_does_and_nothing_else(tmp_path_factory, case):
    content = case if isinstance(case, bytes) else WHOLE[: case[0]] + bytes([case[1]]) + WHOLE[case[0] + 1 :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        with safetensors_io.open_file(path) as file:
            ours = {name: file.read(name).tobytes() for name in file.specs}
    except UserError:
        return
    with safe_open(path, "np") as theirs:  # what is accepted here, safetensors accepts, with the same tensors
        assert set(theirs.keys()) == set(ours)
