"""Decodes every image that would be trained on, before the schedule is made, on all processors. An image that is
accepted here is decoded in the training too, as long as the tar returns the same bytes.

Finished results are kept, in a file per tar beside the index of the tars, so a run that was killed goes on from there.
These files are no outputs, and no stage depends on them. They count only while the tar, filter.max_pixels, the Decoding
and what decodes (image.decoder_version) are the same; a damaged file is made again. Neither kept results nor the number
of processes change a result.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from kohaku_delta.danbooru import image, tar_index, tars
from kohaku_delta.danbooru.image import Decoding
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.printing import print_line
from kohaku_delta.sandbox import audit_hook

FEW = 1000  # images that are decoded sooner than processes start
TASK = 32  # images per task of a process
AHEAD = 4  # tasks per process that are submitted before their results are needed
KEEP_EVERY = 512  # images of a tar, after which their results are kept; a kill costs no more of each tar
LARGE = 1 << 24  # pixels; larger images are decoded one at a time, so that many processes do not fill the memory
RESULTS = pa.schema([("offset", pa.int64()), ("size", pa.int64()), ("width", pa.int32()), ("height", pa.int32())])
KEY = "decoded_from"  # in the metadata of a file of results
TAR_HEADER = 512  # bytes; every member of a tar has one, which bounds the rows of a file of results
ROW_BYTES, MAX_FOOTER = 24, 1 << 20  # of that file

_large_images: AbstractContextManager = nullcontext()  # in a pool a lock of all its processes


@dataclass(frozen=True)
class Task:
    """Images of one tar that one process decodes; lists with one entry per image."""

    tar: Path
    offset: list[int]
    size: list[int]  # in bytes
    large: list[bool]
    max_pixels: int
    decoding: Decoding


def sizes_by_decoding(
    tar: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    pixels: np.ndarray,
    files: dict[int, Path],
    max_pixels: int,
    decoding: Decoding,
    folder: Path | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights (int32) of images after all their pixels were decoded; 0 for one that cannot be decoded.

    tar (its number in `files`), offset, size (bytes) and pixels (by the header): integer arrays, one entry per image.
    folder: where results are kept; None: nowhere. Raises UserError if a tar cannot be read or a process was killed, and
    MemoryError.
    """
    found = np.zeros((len(tar), 2), np.int32)
    order = np.lexsort((offset, tar))
    keys, pieces = {}, []
    for rows in np.split(order, np.flatnonzero(np.diff(tar[order])) + 1) if len(order) else []:
        number = int(tar[rows[0]])
        if folder:
            keys[number] = _result_key(files[number], max_pixels, decoding)
            rows = _fill_kept(found, rows, offset, size, _kept_results(folder, files[number], keys[number]))
        pieces += [rows[start : start + KEEP_EVERY] for start in range(0, len(rows), KEEP_EVERY)]
    missing, large = sum(map(len, pieces)), pixels > LARGE
    tasks = (
        Task(
            files[int(tar[part[0]])],
            offset[part].tolist(),
            size[part].tolist(),
            large[part].tolist(),
            max_pixels,
            decoding,
        )
        for rows in pieces
        for part in _task_rows(rows)
    )
    progress = {"total": len(tar), "initial": len(tar) - missing, "desc": "images decoded", "unit": " images"}
    results = _decode_in_processes(tasks, folder) if missing > FEW else (_decode(task) for task in tasks)
    with closing(results), tqdm(**progress, unit_scale=True, disable=None) as bar:
        for rows in pieces:
            for part in _task_rows(rows):
                found[part] = next(results)
                bar.update(len(part))
            if folder:
                number = int(tar[rows[0]])
                columns = [offset[rows], size[rows], *found[rows].T]
                folder = _keep(folder, files[number], keys[number], pa.table(columns, schema=RESULTS))
    return found[:, 0], found[:, 1]


def _task_rows(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + TASK] for start in range(0, len(rows), TASK)]


def _decode(task: Task) -> list[tuple[int, int]]:
    """(width, height) of each image of a task; (0, 0) for one that cannot be decoded."""
    sizes = []
    for offset, size, large in zip(task.offset, task.size, task.large, strict=True):
        with _large_images if large else nullcontext():
            try:
                data = tars.read_member(task.tar.parent, task.tar.name, offset, size)
                sizes.append(image.decoded_size(data, task.max_pixels, task.decoding))
            except image.UnreadableImage:
                sizes.append((0, 0))
    return sizes


def _decode_in_processes(tasks: Iterable[Task], folder: Path | None) -> Generator[list[tuple[int, int]]]:
    """The results of the tasks, in their order."""
    processes = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    arguments = (context.Lock(), *audit_hook.current_policy())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_process, initargs=arguments)
    waiting: deque = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_decode, task))
            if len(waiting) >= AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # nobody waits for their results; and one that was stopped would never end
        if not isinstance(error, BrokenProcessPool):
            raise
        kept = f"What was decoded is kept in {folder}: run" if folder else "Run"
        raise UserError(
            f"One of the {processes} processes that decode images was killed, most likely because memory ran out. "
            f"{kept} the stage again to go on. Fewer processes need less memory: `taskset -c 0 dvc repro` runs one."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(large_images, policy, kernel_rights: str) -> None:
    """Each process ends with its parent, however that ends; Ctrl-C is the parent's."""
    global _large_images
    _large_images = large_images
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    audit_hook.install_hook(policy, kernel_rights)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _result_key(tar: Path, max_pixels: int, decoding: Decoding) -> str:
    """What the results of a tar depend on."""
    limits = {"max_pixels": max_pixels, **decoding.metadata}
    return json.dumps({"tar": tar_index.tar_state(tar), **limits, "by": image.decoder_version()})


def _results_file(folder: Path, tar: Path) -> Path:
    return folder / f"{tar.stem}.parquet"


def _kept_results(folder: Path, tar: Path, key: str) -> pa.Table:
    """The kept results of a tar; none if its file has another key, or was not written by this code."""
    most = tar.stat().st_size // TAR_HEADER
    try:
        with open(_results_file(folder, tar), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FOOTER + ROW_BYTES * most:
                return RESULTS.empty_table()
            reader = pq.ParquetFile(file)
            metadata = reader.metadata.metadata or {}
            if metadata.get(KEY.encode()) != key.encode() or reader.metadata.num_rows > most:
                return RESULTS.empty_table()
            table = reader.read().replace_schema_metadata(None)
    except (OSError, pa.ArrowException):
        return RESULTS.empty_table()
    is_valid = table.schema == RESULTS and not any(column.null_count for column in table.columns)
    if not is_valid or table.num_rows and pc.min(table["width"]).as_py() < 0 or pc.min(table["height"]).as_py() < 0:
        return RESULTS.empty_table()
    return table


def _fill_kept(found: np.ndarray, rows: np.ndarray, offset: np.ndarray, size: np.ndarray, kept: pa.Table) -> np.ndarray:
    """Fills in the kept results of these rows, and returns the rows that have none."""
    columns = [column.to_numpy().tolist() for column in kept.columns]
    known = {place[:2]: place[2:] for place in zip(*columns, strict=True)}
    sizes = [known.get(place) for place in zip(offset[rows].tolist(), size[rows].tolist(), strict=True)]
    is_known = np.array([each is not None for each in sizes], bool)
    found[rows[is_known]] = np.array([each for each in sizes if each], np.int32).reshape(-1, 2)
    return rows[~is_known]


def _keep(folder: Path, tar: Path, key: str, results: pa.Table) -> Path | None:
    """Adds results to those of a tar. Returns the folder, or None if it cannot be written to."""
    try:
        all_results = pa.concat_tables([_kept_results(folder, tar, key), results])
        parquet.write(all_results, _results_file(folder, tar), {KEY: key})
    except OSError as error:
        print_line(
            f"The results of decoding cannot be kept in {folder} ({error.strerror}): a run that is killed will decode "
            "the following images again. Choose another place with --index.",
            err=True,
        )
        return None
    return folder
