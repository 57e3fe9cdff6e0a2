import io
import os
import subprocess
import tarfile
import time

import numpy as np
import pytest

from danbooru_factory import write_tar
from kohaku_delta.danbooru import tar_index, tars
from kohaku_delta.errors import UserError


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def contents(path):
    held = tar_index.members_of(path)
    columns = zip(held.id.tolist(), held.extension.to_pylist(), held.offset.tolist(), held.size.tolist(), strict=True)
    return {
        post: (extension, tars.read_member(path.parent, path.name, offset, size))
        for post, extension, offset, size in columns
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_and_read_in_place(tmp_path, form):
    long = "folder-with-a-long-name/" * 8
    files = [("1001.webp", b"one"), ("1.png", b""), (f"{long[:150]}/2001.jpg", b"x" * 1500), ("5.WEBP", b"y" * 512)]
    if form != tarfile.USTAR_FORMAT:
        files.append((f"{long}ü/3001.webp", b"long"))
    found = contents(write_tar(tmp_path / "data-0001.tar", files, form))
    assert found.pop(3001, ("webp", b"long")) == ("webp", b"long")
    assert found == {1001: ("webp", b"one"), 1: ("png", b""), 2001: ("jpg", b"x" * 1500), 5: ("webp", b"y" * 512)}


def test_hostile_members_are_passed_over_and_the_first_regular_file_wins(tmp_path):
    files = [
        special("1.webp", tarfile.SYMTYPE, "/etc/passwd"),
        special("1.webp", tarfile.CHRTYPE),
        special("1.webp", tarfile.BLKTYPE), special("1.webp", tarfile.FIFOTYPE), special("1.webp", tarfile.DIRTYPE),
        special("3.webp/", tarfile.DIRTYPE),
        ("deep/in/folders/1.webp", b"first"), ("1.webp", b"second"), ("1.png", b"third"), ("../../2.webp", b"up"),
        ("/absolute/4.webp", b"root"),
        ("readme.txt", b"no id"), ("12a.webp", b"no id"), ("-7.webp", b"no id"), ("7", b"no extension"), (".webp",
        b"no id"), ("8.tar.webp", b"no id"),
        ("._9.webp", b"no id"), ("99999999999999999999.webp", b"no id"), (b"\xff\xfe/10.webp".decode("utf-8",
        "surrogateescape"), b"bytes"),
    ]  # fmt: skip
    found = contents(write_tar(tmp_path / "data-0001.tar", files))
    assert found == {1: ("webp", b"first"), 2: ("webp", b"up"), 4: ("webp", b"root"), 10: ("webp", b"bytes")}


def test_an_archive_without_members_is_sound(tmp_path):
    assert contents(write_tar(tmp_path / "data-0001.tar", [])) == {}


@pytest.mark.parametrize(
    "cut, message",
    [
        (0, "is empty"),
        (100, "is not a tar"),
        (512, "truncated"),
        (700, "truncated"),
        (1536, "truncated"),
        (3000, "truncated"),
        (4096, "truncated"),
    ],
)
def test_a_truncated_tar_is_refused_by_name(tmp_path, cut, message):
    path = write_tar(tmp_path / "data-0001.tar", [("1.webp", b"a" * 1000), ("1001.webp", b"b" * 2000)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"data-0001.tar .*{message}.*Download it again"):
        tar_index.members_of(path)


@pytest.mark.parametrize(
    "data", [b"not a tar at all, but long enough to hold a header " * 20, b"\x1f\x8b" + b"\7" * 2000, b"\xff" * 1024]
)
def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path, data):
    path = tmp_path / "data-0001.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match="data-0001.tar is not a tar.*Download it again"):
        tar_index.members_of(path)


def test_a_damaged_header_is_refused_and_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "data-0001.tar", [("1.webp", b"a" * 1000), ("1001.webp", b"b" * 2000)])
    data = bytearray(path.read_bytes())
    data[1536 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="at byte 1,536 there is no member's header"):
        tar_index.members_of(path)


def test_numbers_come_from_names(tmp_path):
    for name in ("data-0000.tar", "data-1999.tar", "data-2000.tar", "notes.tar", "data-0000.json"):
        (tmp_path / name).touch()
    assert {number: path.name for number, path in tars.tars_in(tmp_path).items()} == {
        0: "data-0000.tar",
        1999: "data-1999.tar",
        2000: "data-2000.tar",
    }
    (tmp_path / "data-0.tar").touch()
    with pytest.raises(UserError, match="same number"):
        tars.tars_in(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        tars.tars_in(tmp_path / "none")


def header(name, size, kind=tarfile.REGTYPE):
    """A header that claims `size` bytes, with the right checksum."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def signed_header(size):
    """A header with this text as its size, and the right checksum."""
    data = bytearray(header("1.webp", 0))
    data[124:136], data[148:156] = size, b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


HOSTILE = {
    "a long extension": (header("x", 1 << 30, tarfile.XHDTYPE), 2 << 30, "extension header claims 1,073,741,824 bytes"),
    "a long name": (header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME), 2 << 30, "extension header claims"),
    "a member longer than the tar": (header("1.webp", 1 << 40), 4096, "is truncated"),
    "a negative size": (header("1.webp", -1024), 4096, "is truncated"),
    "an extension of a negative size": (header("x", -1024, tarfile.XHDTYPE), 4096, "is truncated"),
    "a negative size in digits": (signed_header(b"-0000002000\0"), 4096, "negative size"),
    "a size that is not a number": (signed_header(b"0000000008x\0"), 4096, "is not a tar"),
    "a record of length 0": (header("x", 8, tarfile.XHDTYPE) + b"0 path=a".ljust(512, b"\0"), 4096, "cannot be read"),
    "a record that ends nowhere": (header("x", 8, tarfile.XHDTYPE) + b"9999999999".ljust(512), 4096, "cannot be read"),
    "a thousand extensions": (
        (header("x", 4, tarfile.GNUTYPE_LONGNAME) + b"name".ljust(512, b"\0")) * 5000 + header("y", 9**9), 0,
        "truncated"
    ),
    "a size in an extension": (
        header("x", 23, tarfile.XHDTYPE) + b"23 size=99999999999999\n".ljust(512, b"\0") + header("1.webp", 1), 0,
        "truncated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_before_what_it_claims_is_read(tmp_path, case):
    data, length, message = HOSTILE[case]
    path = tmp_path / "data-0001.tar"
    path.write_bytes(data)
    os.truncate(path, max(length, len(data)))
    with pytest.raises(UserError, match=f"data-0001.tar .*{message}"):
        tar_index.members_of(path)


def test_two_hundred_thousand_records_of_an_extension_header_take_no_time(tmp_path):
    records = b"5 a=\n" * 200_000
    data = header("x", len(records), tarfile.XHDTYPE) + records.ljust(-(-len(records) // 512) * 512, b"\0")
    path = tmp_path / "data-0001.tar"
    path.write_bytes(data + header("7.webp", 0) + bytes(1024))
    started = time.process_time()
    assert contents(path) == {7: ("webp", b"")} and time.process_time() - started < 5


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_many_members_of_all_kinds_is_read_as_the_standard_library_reads_it(tmp_path, form):
    rng = np.random.default_rng(6)
    files = []
    for place, post in enumerate(rng.permutation(5000).tolist()):
        sizes = [0, 1, 511, 512, 513, 1500] + [40_000] * (
            place % 4000 > 2000
        )  # small ones by the thousand are read far ahead
        name = (
            {0: "folder/" * 12, 1: "./"}.get(int(rng.integers(0, 40)), "")
            + f"{post}."
            + str(rng.choice(["webp", "png", "JPG", "x" * 12]))
        )
        files.append(
            special(name, tarfile.SYMTYPE, "1.webp")
            if rng.random() < 0.02
            else (name, rng.bytes(int(rng.choice(sizes))))
        )
    path = write_tar(tmp_path / "data-0001.tar", files, form)
    with tarfile.open(path) as archive:
        expected = {
            int(each.name.split("/")[-1].split(".")[0]): (each.offset_data, each.size, each.name.split(".")[-1].lower())
            for each in archive
            if each.isfile()
        }
    held = tar_index.members_of(path)
    assert (
        dict(
            zip(
                held.id.tolist(),
                zip(held.offset.tolist(), held.size.tolist(), held.extension.to_pylist(), strict=True),
                strict=True,
            )
        )
        == expected
    )


FOUR = [(f"{post}.webp", bytes([post]) * 20_000) for post in (1, 2, 3, 4)]  # each member has 20,992 bytes in the tar


def end_in(data, place, count):
    """The tar with zeros from `place` on, as a file that was preallocated and not filled to its end."""
    return data[:place] + bytes(count) + data[place + count :]


HOLES = {
    "not filled to its end": lambda data: end_in(data, 2 * 20_992, len(data) - 2 * 20_992),
    "not filled from the end of a member's bytes": lambda data: end_in(data, 20_000, len(data) - 20_000),
    "a hole over a header": lambda data: end_in(data, 20_992, 512),
    "a hole over a member": lambda data: end_in(data, 20_992, 20_992),
    "never filled": lambda data: bytes(len(data)),
    "two archives": lambda data: data + data,
    "two archives without padding between them": lambda data: data[: 4 * 20_992 + 512] + data,
    "one byte behind the end": lambda data: data[:-1] + b"x",
    "a signature behind the end": lambda data: data + b"-----BEGIN SIGNATURE-----",
    "a hole of a gigabyte": lambda data: (data, 1 << 30),
}


@pytest.mark.parametrize("case", HOLES)
def test_zeros_inside_a_tar_are_not_taken_for_its_end(tmp_path, case):
    path = write_tar(tmp_path / "data-0001.tar", FOUR)
    changed = HOLES[case](path.read_bytes())
    path.write_bytes(changed[0] if isinstance(changed, tuple) else changed)
    if isinstance(changed, tuple):
        os.truncate(path, changed[1])
    with pytest.raises(UserError, match="data-0001.tar is damaged, not filled, or several archives.*Download it again"):
        tar_index.members_of(path)


@pytest.mark.parametrize("blocks", [1, 2, 20, 128, 256, 512, 1024, 2048])
def test_records_of_every_usual_length_end_an_archive(tmp_path, blocks):
    for post, data in [(name, content) for name, content in FOUR]:
        (tmp_path / post).write_bytes(data)
    path = tmp_path / "data-0001.tar"
    subprocess.run(["tar", "-b", str(blocks), "-cf", path, *(name for name, _ in FOUR)], cwd=tmp_path, check=True)
    assert contents(path) == {int(name[0]): ("webp", data) for name, data in FOUR}


@pytest.mark.parametrize("pieces", [1, 4, 5, 21 + 4, 100])  # 4 fit into a GNU header, 21 into each block behind it
@pytest.mark.parametrize("form", ["oldgnu", "gnu", "posix"])
def test_a_sparse_file_is_refused_whatever_number_of_pieces_it_has(tmp_path, form, pieces):
    with open(tmp_path / "1.webp", "wb") as file:
        for piece in range(pieces):
            file.seek(piece * (1 << 17))
            file.write(b"x" * 4096)
        file.truncate(pieces << 17)
    (tmp_path / "2.webp").write_bytes(b"behind it")
    path = tmp_path / "data-0001.tar"
    subprocess.run(["tar", f"--format={form}", "--sparse", "-cf", path, "1.webp", "2.webp"], cwd=tmp_path, check=True)
    with tarfile.open(path) as archive:
        is_sparse = archive.getmember("1.webp").issparse()
    if is_sparse:
        with pytest.raises(UserError, match="data-0001.tar holds .*1.webp' as a sparse file .*without `--sparse`"):
            tar_index.members_of(path)
    else:  # a file system without holes
        assert contents(path)[2] == ("webp", b"behind it")


@pytest.mark.parametrize(
    "form, folder",
    [
        *(
            (form, folder)
            for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
            for folder in ("", "long/" * 16)
        ),
        *((form, "a-folder-with-a-long-name/" * 5) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
    ],  # a target of 100 bytes is the longest that ustar has room for
)
def test_a_hard_link_is_the_file_that_it_names(tmp_path, form, folder):
    first, second = f"{folder}1.webp", f"{folder}2.png"
    path = write_tar(
        tmp_path / "data-0001.tar", [(first, b"first"), special(second, tarfile.LNKTYPE, first), ("3.webp", b"z")], form
    )
    assert contents(path) == {1: ("webp", b"first"), 2: ("png", b"first"), 3: ("webp", b"z")}
    with tarfile.open(path) as archive:
        assert archive.extractfile(second).read() == b"first"


def test_a_hard_link_to_nothing_is_refused(tmp_path):
    path = write_tar(tmp_path / "data-0001.tar", [special("1.webp", tarfile.LNKTYPE, "2.webp"), ("2.webp", b"after")])
    with pytest.raises(UserError, match="holds b'1.webp' as a hard link to b'2.webp' .*no such file comes before it"):
        tar_index.members_of(path)


@pytest.mark.parametrize(
    "kind, known", [(b"M", False), (b"A", False), (b"z", False), (b"D", True), (b"V", True), (b"X", True), (b"5", True)]
)
def test_a_member_of_an_unknown_type_is_refused(tmp_path, kind, known):
    path = tmp_path / "data-0001.tar"
    path.write_bytes(header("1.webp", 0, kind) + header("2.webp", 0) + bytes(1024))
    if known:
        assert contents(path) == {2: ("webp", b"")}
    else:
        with pytest.raises(UserError, match="holds b'1.webp' as a member of the type .*which is not known"):
            tar_index.members_of(path)


def pax(kind, **records):
    """An extension header."""
    return (
        tarfile.TarInfo.create_pax_global_header(records)
        if kind == b"g"
        else (tarfile.TarInfo._create_pax_generic_header(records, kind, "utf-8"))
    )


@pytest.mark.parametrize(
    "data, message",
    [
        (pax(b"g", path="9.webp") + header("1.webp", 0), "one name .in a global header"),
        (pax(b"g", size="0") + header("1.webp", 512) + bytes(512), "one size .in a global header"),
        (pax(b"g", comment="x") + header("1.webp", 0), None),
        (pax(b"x", size="five") + header("1.webp", 0), "a size that is not a number"),
        (pax(b"x", size="-512") + header("1.webp", 0), "a size that is not a number"),
    ],
)
def test_what_an_extension_header_says_is_obeyed_or_refused(tmp_path, data, message):
    path = tmp_path / "data-0001.tar"
    path.write_bytes(data + bytes(1024))
    if message is None:
        assert contents(path) == {1: ("webp", b"")}
    else:
        with pytest.raises(UserError, match=message):
            tar_index.members_of(path)


def random_tar(rng):
    """Bytes of a tar in which anything may have happened."""
    file = io.BytesIO()
    form = int(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for post in range(int(rng.integers(1, 8))):
            folder = str(rng.choice(["", "f/", "folder-with-a-name/" * 6 if form != tarfile.USTAR_FORMAT else "g/"]))
            info = tarfile.TarInfo(f"{folder}{post}.webp")
            info.size = int(rng.choice([0, 1, 511, 512, 5000, 20_000]))
            if post and rng.random() < 0.2:
                info.size, info.type = 0, tarfile.LNKTYPE
                info.linkname = str(rng.choice(archive.getnames()))
            archive.addfile(info, io.BytesIO(rng.bytes(info.size)))
    data = bytearray(file.getvalue())
    for _ in range(int(rng.integers(0, 3))):
        change = rng.integers(0, 5)
        start = int(rng.integers(0, len(data) // 512 + 1)) * 512
        if change == 0:
            count = 512 * int(rng.integers(1, 40))
            data = bytearray(end_in(bytes(data), start, min(count, len(data) - start)))
        elif change == 1:
            data += rng.bytes(int(rng.choice([1, 511, 512, 3000])))
        elif change == 2:
            data += bytes(data)
        elif change == 3:
            data[start:start] = bytes(512 * int(rng.integers(1, 40)))
        else:
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)


def test_every_file_that_the_standard_library_finds_is_found_or_the_tar_is_refused(tmp_path):
    """`ignore_zeros` reads on behind every end, so a file that it alone finds is one that would be lost."""
    rng, path, read, refused = np.random.default_rng(8), tmp_path / "data-0001.tar", 0, 0
    for _ in range(1500):
        path.write_bytes(random_tar(rng))
        try:
            found = contents(path)
        except UserError:
            refused += 1
            continue
        with tarfile.open(path, ignore_zeros=True) as archive:
            files = [each for each in archive if each.isfile() or each.islnk()]
            first = {each.name.split("/")[-1]: each for each in reversed(files)}
            expected = {name: archive.extractfile(each).read() for name, each in first.items()}
        assert {f"{post}.{extension}": data for post, (extension, data) in found.items()} == {
            name: data for name, data in expected.items() if tar_index.NAME.fullmatch(name.encode())
        }
        read += 1
    assert read > 300 and refused > 300
