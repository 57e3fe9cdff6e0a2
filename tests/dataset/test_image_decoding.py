"""Every image that filter accepts is decoded beforehand; what was decoded before a kill is not decoded again."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from danbooru_factory import picture, write_database, write_tar
from kohaku_delta import params
from kohaku_delta.danbooru import image, tar_index, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import filtering, image_decoding
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet

ROOT = Path(__file__).resolve().parents[2]
TARS, IMAGES = 3, 60  # tars, and images in each
SOON = 20  # seconds
# filter_posts in a process of its own, with many processes that decode slowly: write(folder of the outputs)
SCRIPT = """
import sys, time
from pathlib import Path
from kohaku_delta import params
from kohaku_delta.danbooru import image, tars
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import filtering, image_decoding
from kohaku_delta.formats import parquet

decoded_size = image.decoded_size
def slow(data, max_pixels, decoding):
    time.sleep({pause})
    return decoded_size(data, max_pixels, decoding)
image.decoded_size = slow
image_decoding.FEW, image_decoding.TASK, image_decoding.KEEP_EVERY = 0, 2, 8

if __name__ == "__main__":
    place = Path(sys.argv[1])
    recipe = params.load({params!r})
    database = Database(place / "a.db")
    ids = database.post_ids()
    for name, table in zip(("posts", "dropped"), filtering.filter_posts(
        database, tars.tars_in(place / "images"), ids, recipe.filter, recipe.caption)):
        parquet.write(table, place / sys.argv[2] / f"{{name}}.parquet")
"""


@pytest.fixture
def place(tmp_path):
    """A database and tars in which every seventh image cannot be decoded."""
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    posts = []
    for number in range(TARS):
        ids = [1000 * row + number for row in range(1, IMAGES + 1)]
        files = [noise(rng) if row % 7 else noise(rng)[:900] + bytes(500) for row in range(IMAGES)]
        write_tar(
            tmp_path / "images" / f"data-{number:04d}.tar",
            [(f"{post}.webp", data) for post, data in zip(ids, files, strict=True)],
        )
        posts += ids
    write_database(tmp_path / "a.db", [{"id": post} for post in posts])
    return tmp_path


def noise(rng, width=32, height=32, **options):
    from PIL import Image

    file = image.io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "WEBP", **options)
    return file.getvalue()


def start(place, out, pause=0.0):
    script = place / "run.py"
    script.write_text(SCRIPT.format(pause=pause, params=str(ROOT / "params.yaml")))
    return subprocess.Popen(
        [sys.executable, script, place, out],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        start_new_session=True,
    )


def run_here(place, **changes):
    recipe = params.load(ROOT / "params.yaml")
    database = Database(place / "a.db")
    parameters = recipe.filter.model_copy(update=changes)
    return filtering.filter_posts(
        database, tars.tars_in(place / "images"), database.post_ids(), parameters, recipe.caption
    )


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that this process decodes."""
    count = []
    decode = image.decoded_size
    monkeypatch.setattr(image, "decoded_size", lambda *arguments: count.append(1) or decode(*arguments))
    return count


def children(process: int) -> set[int]:
    """The processes that descend from one, itself excluded."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, size = {process}, 0
    while size != len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {process}


def decoders(process: int) -> set[int]:
    def command(child: int) -> bytes:
        try:
            return Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            return b""

    return {child for child in children(process) if b"spawn_main" in command(child)}


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=SOON):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_one_that_was_not_killed(place, decoded):
    untouched = start(place, "once")
    assert untouched.wait(60) == 0, untouched.stderr.read()
    kept = place / "images.members.decoded"
    for file in kept.iterdir():
        file.unlink()

    killed = start(place, "killed", pause=0.02)
    wait_for(lambda: (kept / "data-0001.parquet").is_file())
    workers = children(killed.pid)
    killed.kill()
    killed.wait()
    assert workers
    wait_for(lambda: not any(map(is_running, workers)), 5)  # no process is left behind
    finished = sum(parquet.read(file).num_rows for file in kept.glob("*.parquet"))
    assert IMAGES <= finished < TARS * IMAGES

    for name, table in zip(("posts", "dropped"), run_here(place), strict=True):
        parquet.write(table, place / "again" / f"{name}.parquet")
        assert (place / "again" / f"{name}.parquet").read_bytes() == (place / "once" / f"{name}.parquet").read_bytes()
    assert len(decoded) == TARS * IMAGES - finished


def test_an_image_is_decoded_once_whatever_else_is_selected(place, decoded):
    recipe = params.load(ROOT / "params.yaml")
    database, files = Database(place / "a.db"), tars.tars_in(place / "images")
    ids = database.post_ids()
    filtering.filter_posts(database, files, ids[::2], recipe.filter, recipe.caption)
    assert len(decoded) == len(ids[::2])
    filtering.filter_posts(database, files, ids, recipe.filter, recipe.caption)
    assert len(decoded) == len(ids)


def test_another_tar_limit_or_decoder_is_decoded_again(place, decoded, monkeypatch):
    first = run_here(place)
    assert len(decoded) == TARS * IMAGES
    assert run_here(place) == first and len(decoded) == TARS * IMAGES
    os.utime(place / "images" / "data-0001.tar", ns=(0, 0))
    assert run_here(place) == first and len(decoded) == (TARS + 1) * IMAGES
    assert run_here(place, max_pixels=2000) == first and len(decoded) == (2 * TARS + 1) * IMAGES
    monkeypatch.setattr(image, "decoder_version", lambda: "libwebp of tomorrow")
    assert run_here(place, max_pixels=2000) == first and len(decoded) == (3 * TARS + 1) * IMAGES


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, key: file.write_bytes(b""),
        lambda file, key: file.write_bytes(file.read_bytes()[:-20]),
        lambda file, key: file.write_bytes(os.urandom(3000)),
        lambda file, key: os.truncate(file, 1 << 30),
        lambda file, key: (file.unlink(), file.mkdir(), (file / "x").touch()),
        lambda file, key: parquet.write(pa.table({"offset": ["a"]}), file, key),
        lambda file, key: parquet.write(pa.table([[-1] * IMAGES] * 4, schema=image_decoding.RESULTS), file, key),
        lambda file, key: parquet.write(pa.table([[0] * 10**6] * 4, schema=image_decoding.RESULTS), file, key),
    ],
)  # fmt: skip
def test_a_damaged_file_of_results_is_made_again(place, decoded, damage):
    first = run_here(place)
    file = place / "images.members.decoded" / "data-0001.parquet"
    key = image_decoding._result_key(place / "images" / "data-0001.tar", 1 << 28, image.RELEASE)
    damage(file, {image_decoding.KEY: key})
    assert run_here(place) == first and len(decoded) == (TARS + 1) * IMAGES


def test_where_results_cannot_be_kept_the_stage_says_so_and_goes_on(place, capsys):
    (place / "images.members.decoded").write_bytes(b"no folder")
    posts, dropped = run_here(place)
    assert posts.num_rows + dropped.num_rows == TARS * IMAGES
    said = capsys.readouterr().err
    assert said.count("cannot be kept in") == 1 and "--index" in said


@pytest.mark.parametrize("stopped", [False, True])
def test_a_decoding_process_that_is_killed_ends_the_stage_with_a_sentence(place, stopped):
    running = start(place, "out", pause=0.05)
    wait_for(lambda: len(decoders(running.pid)) >= 2 or len(os.sched_getaffinity(0)) < 2)
    wait_for((place / "images.members.decoded" / "data-0000.parquet").is_file)
    workers = sorted(decoders(running.pid))
    if stopped and len(workers) > 1:
        os.kill(workers[1], signal.SIGSTOP)
    os.kill(workers[0], signal.SIGKILL)
    _, said = running.communicate(timeout=SOON)
    assert running.returncode and "processes that decode images was killed, most likely because memory" in said
    assert "is kept in" in said and "taskset" in said
    wait_for(lambda: not any(map(is_running, workers)), 5)


def test_ctrl_c_ends_all_processes_within_seconds(place):
    running = start(place, "out", pause=0.5)
    wait_for(lambda: decoders(running.pid))
    time.sleep(0.5)
    workers = children(running.pid)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = running.communicate(timeout=SOON)
    assert "Interrupted" in said and "Traceback" not in said
    wait_for(lambda: not any(map(is_running, workers)), 5)


def cut_in_half(data: bytes) -> bytes:
    """A WebP file that lacks its second half, with the sizes in its headers mended."""
    half = data[: len(data) // 4 * 2]
    file_size, chunk_size = ((len(half) - before).to_bytes(4, "little") for before in (8, 20))
    return half[:4] + file_size + half[8:16] + chunk_size + half[20:]


def test_a_picture_cut_in_half_with_its_sizes_mended_is_found_by_decoding_alone(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "images").mkdir()
    half = cut_in_half(noise(rng, 200, 300, quality=90))
    assert image.webp_size(half[: image.HEAD], len(half)) == (200, 300)
    write_tar(tmp_path / "images" / "data-0000.tar", [("1000.webp", noise(rng, 200, 300)), ("2000.webp", half)])
    write_database(tmp_path / "a.db", [{"id": 1000}, {"id": 2000}])
    assert run_here(tmp_path, image_check="header")[0]["post_id"].to_pylist() == [1000, 2000]
    posts, dropped = run_here(tmp_path)
    assert posts["post_id"].to_pylist() == [1000]
    assert dropped.to_pylist() == [{"post_id": 2000, "reason": "unreadable image"}]


def test_a_tar_that_cannot_be_read_is_named_with_its_place(place, monkeypatch):
    run_here(place, image_check="header")  # makes the index, which reads the tars too

    def fails(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tars, "pread_fully", fails)
    with pytest.raises(UserError, match=r"data-0000.tar cannot be read from byte 512 to .*Input/output error"):
        run_here(place)


def test_a_disk_that_fails_while_a_header_is_read_drops_no_image(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "images" / "data-0000.tar", [("1000.png", picture(kind="PNG"))])
    write_database(tmp_path / "a.db", [{"id": 1000}])
    assert run_here(tmp_path, image_check="header")[0].num_rows == 1

    def fails(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(UserError, match=r"data-0000.tar cannot be read from byte 512 to .*Input/output error"):
        run_here(tmp_path, image_check="header")


def test_memory_that_is_missing_is_no_fault_of_an_image(tmp_path):
    code = (
        "import resource, sys; from kohaku_delta.danbooru import image\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)\n"
        "for look in (image.decode, image.decoded_size):\n"
        "    try: look(data)\n"
        "    except MemoryError: print('memory')\n"
        "    except image.UnreadableImage as error: print('unreadable', error)\n"
    )
    for options in ({"method": 0}, {"lossless": True, "method": 0}, {"kind": "PNG", "compress_level": 1}):
        path = tmp_path / "large"
        path.write_bytes(picture(5000, 5000, **options))
        done = subprocess.run(
            [sys.executable, "-c", code, path],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "memory\nmemory\n", done.stderr


def test_the_key_of_results_names_tar_limit_code_and_libraries(place):
    key = json.loads(image_decoding._result_key(place / "images" / "data-0000.tar", 5, image.RELEASE))
    assert key["tar"] == tar_index.tar_state(place / "images" / "data-0000.tar") and key["max_pixels"] == 5
    assert json.loads(key["by"]).keys() >= {"code", "pil", "webp"}
