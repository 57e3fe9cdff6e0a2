"""Past the page cache come and go the same bytes as through it."""

import errno
import os
import random

import numpy as np
import pytest

from kohaku_delta.formats import direct_io
from kohaku_delta.formats.buffer_pool import BufferPool


@pytest.fixture(scope="module")
def content():
    return random.Random(1).randbytes((5 << 20) + 77)


@pytest.fixture
def file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    return tmp_path / "file"


@pytest.mark.parametrize("kind", ["direct", "not offered", "not kept"])
@pytest.mark.parametrize("place", [0, 8, 4096, 4104, 123, (4 << 20) + 16])
@pytest.mark.parametrize("length", [0, 1, 4095, 1 << 18, (1 << 20) + 6, 3 << 20])
def test_a_read_gives_the_files_bytes_and_fewer_at_its_end(file, content, place, length, kind, monkeypatch):
    opened, read = os.open, os.preadv

    def refuses(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opened(path, flags, *more)

    def fails(descriptor, buffers, offset):
        if descriptor == reader._past:
            raise OSError(errno.EINVAL, "no")
        return read(descriptor, buffers, offset)

    if kind == "not offered":
        monkeypatch.setattr(os, "open", refuses)
    reader = direct_io.Reader(file)
    if kind == "not kept":
        monkeypatch.setattr(os, "preadv", fails)
    found = reader.read(place, length, direct_io.aligned_buffer(length))
    assert found == content[place : place + length]
    assert (
        not len(found)
        or place % direct_io.ALIGNED
        or np.frombuffer(found, np.uint8).ctypes.data % direct_io.ALIGNED == 0
    )
    reader.close()


@pytest.mark.parametrize("size", [0, 5, 4096, direct_io.LEAST + 1, direct_io.STAGE, (9 << 20) + 1])
@pytest.mark.parametrize("kept", [True, False])
def test_pieces_of_any_size_are_written_in_order(tmp_path, size, kept, monkeypatch):
    chance = random.Random(size)
    content = chance.randbytes(size)
    if not kept:
        written = os.write
        monkeypatch.setattr(
            os,
            "write",
            lambda descriptor, data: (
                written(descriptor, data) if not writer._direct else (_ for _ in ()).throw(OSError(errno.EINVAL, "no"))
            ),
        )
    with open(tmp_path / "file", "wb") as file:
        writer = direct_io.Writer(file.fileno(), size)
        place = 0
        while place < size:
            step = chance.choice((1, 100, 5000, 1 << 20, 6 << 20))
            writer.write(memoryview(content[place : place + step]))
            place += step
        writer.close()
    assert (tmp_path / "file").read_bytes() == content


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open(tmp_path / "file", "wb") as file:
        writer = direct_io.Writer(file.fileno(), 1 << 20)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(memoryview(bytes(direct_io.STAGE)))


def test_spare_memory_comes_back_whole_and_at_a_blocks_boundary():
    spare = BufferPool(10_000)
    first = spare.acquire(9000)
    assert first.ctypes.data % direct_io.BLOCK == 0 and first.size >= 10_000 + 2 * direct_io.BLOCK
    address = first.ctypes.data
    spare.release(first[5:100].view(np.int8))
    del first
    again = spare.acquire(1)
    assert again.ctypes.data == address and again.size >= 10_000
    assert spare.acquire(50_000).size >= 50_000
