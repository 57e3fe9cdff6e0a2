"""Past the page cache the same bytes are read and written as through it."""

import errno
import os
import random

import numpy as np
import pytest

from kohaku_delta.formats import direct_io

CONTENT = random.Random(1).randbytes((5 << 20) + 77)


def refuse(*_):
    raise OSError(errno.EINVAL, "no")


@pytest.mark.parametrize("support", ["direct", "not offered", "offered but refused"])
@pytest.mark.parametrize("offset", [0, 8, 4096, 4104, 123, (4 << 20) + 16])
@pytest.mark.parametrize("length", [0, 1, 4095, 1 << 18, (1 << 20) + 6, 3 << 20])
def test_a_read_gives_the_files_bytes_and_fewer_at_its_end(tmp_path, offset, length, support, monkeypatch):
    (tmp_path / "file").write_bytes(CONTENT)
    plain_open, plain_read = os.open, os.preadv
    if support == "not offered":
        monkeypatch.setattr(
            os, "open", lambda path, flags: refuse() if flags & os.O_DIRECT else plain_open(path, flags)
        )
    reader = direct_io.Reader(tmp_path / "file")
    if support == "offered but refused":
        monkeypatch.setattr(
            os,
            "preadv",
            lambda descriptor, *rest: refuse() if descriptor == reader._direct else plain_read(descriptor, *rest),
        )
    found = reader.read(offset, length)
    assert found == CONTENT[offset : offset + length]
    if len(found) and offset % direct_io.ALIGNMENT == 0:
        assert np.frombuffer(found, np.uint8).ctypes.data % direct_io.ALIGNMENT == 0
    reader.close()


@pytest.mark.parametrize("size", [0, 5, 4096, direct_io.MIN_DIRECT + 1, direct_io.STAGE, (9 << 20) + 1])
@pytest.mark.parametrize("kept", [True, False])
def test_pieces_of_any_size_are_written_in_order(tmp_path, size, kept, monkeypatch):
    chance = random.Random(size)
    content = chance.randbytes(size)
    with open(tmp_path / "file", "wb") as file:
        writer = direct_io.Writer(file.fileno(), size)
        plain_write = os.write
        if not kept:
            monkeypatch.setattr(os, "write", lambda *rest: refuse() if writer._direct else plain_write(*rest))
        done = 0
        while done < size:
            step = chance.choice((1, 100, 5000, 1 << 20, 6 << 20))
            writer.write(memoryview(content[done : done + step]))
            done += step
        writer.close()
    assert (tmp_path / "file").read_bytes() == content


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open(tmp_path / "file", "wb") as file:
        writer = direct_io.Writer(file.fileno(), 1 << 20)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(memoryview(bytes(direct_io.STAGE)))
