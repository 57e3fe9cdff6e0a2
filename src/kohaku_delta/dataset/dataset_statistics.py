"""Invariant: every figure of the report is counted from what the stages wrote and from the database; nothing is
estimated.

`survey` gives one dictionary of plain numbers: what pictures.py draws, what published.py compares and what dataset.json
holds.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from kohaku_delta.danbooru.database import Database, unique_sorted
from kohaku_delta.dataset import post_metadata as rows
from kohaku_delta.dataset.captions import display_names
from kohaku_delta.dataset.post_metadata import REASONS
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import Caption, Schedule
from kohaku_delta.sdxl.tokenizer import ClipTokenizer, is_plain

TOP = 20  # names of each kind
BUCKET = re.compile(r"bucket \d+: resolution \((\d+), (\d+)\), count: (\d+)")
META = 4


def filter_counts(selection: Path, posts: Path, dropped: Path) -> dict:
    """What became of the selected posts. Refuses files that do not belong together: selected = trained + dropped."""
    drawn, kept, lost = (
        parquet.read(selection, ["drawn"]),
        parquet.read(posts, ["despite"]),
        parquet.read(dropped, ["reason"]),
    )
    if drawn.num_rows != kept.num_rows + lost.num_rows:
        raise UserError(
            f"{selection} holds {drawn.num_rows:,} posts, but {posts} and {dropped} hold {kept.num_rows:,} + {lost.num_rows:,}. "
            "They are of different runs: run the filter stage again."
        )

    def counted(column: pa.ChunkedArray) -> dict[str, int]:
        found = {each["values"]: each["counts"] for each in column.drop_null().value_counts().to_pylist()}
        return {reason: found[reason] for reason in REASONS if reason in found}

    return {
        "drawn": pc.sum(drawn["drawn"]).as_py(), "selected": drawn.num_rows, "trained": kept.num_rows,
        "dropped": counted(lost["reason"]), "despite": counted(kept["despite"]),
    }  # fmt: skip


def metadata_counts(database: Database, ids: np.ndarray, parameters: Caption) -> dict:
    """Posts of each year (0: unreadable), and of each rating and quality (rows: ratings, then none; columns: qualities,
    then none).
    """
    said = rows.post_metadata(database, ids, parameters)
    years, counts = np.unique(said.year, return_counts=True)
    places = list(parameters.ratings)
    rating = np.array([places.index(each) if each in places else len(places) for each in range(-1, max(places) + 1)])[
        said.rating + 1
    ]
    quality = np.where(said.quality < 0, len(parameters.quality), said.quality)
    matrix = np.zeros((len(places) + 1, len(parameters.quality) + 1), np.int64)
    np.add.at(matrix, (rating, quality), 1)
    return {"years": dict(zip(years.tolist(), counts.tolist(), strict=True)), "ratings": matrix.tolist()}


def bucket_counts(path: Path, parameters: Schedule) -> dict:
    """Images of each bucket, the number of micro-batches of an epoch (B), and the steps."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [BUCKET.fullmatch(line) for line in lines]
    if not all(found):
        raise UserError(
            f"{path} has a line that is not of the form “bucket 0: resolution (256, 3328), count: 177”: {lines[found.index(None)][:80]!r}. Run the schedule stage again."
        )
    sizes = [[int(each) for each in match.groups()] for match in found]
    batches = sum(math.ceil(count / parameters.batch_size) for _, _, count in sizes)
    return {
        "buckets": sizes,
        "micro_batches": batches,
        "steps": parameters.epochs * math.ceil(batches / parameters.micro_batches),
    }


def tag_and_token_counts(captions: Path, database: Database, parameters: Caption, tokenizer: ClipTokenizer) -> dict:
    """The most frequent general tags, words of captions, and how many captions have which number of tokens.

    A caption's length is what the trainer's tokenizer makes of it before anything is shuffled or dropped. CLIP's
    tokenizer never joins what a space divides, so it is the sum over the caption's words, each with its comma (which
    may join the punctuation before it), the last one without: every distinct word is tokenised once. A caption with a
    word that ftfy may change is tokenised whole: ftfy looks at the whole text.
    """
    file = pq.ParquetFile(captions, read_dictionary=["keep.list.element", "general.list.element"])
    place: dict[str, int] = {}
    images, lengths = np.zeros(0, np.int64), []
    behind, last = (
        np.zeros(0, np.int32),
        np.zeros(0, np.int32),
    )  # tokens of each word, with a comma behind it and without
    plain = np.zeros(0, bool)  # words that cleaning leaves as they are
    for number in tqdm(range(file.num_row_groups), desc="captions", unit=" row groups", disable=None):
        part = file.read_row_group(number, columns=["keep", "general"])
        keep, general = (_list_lengths(part[name]) for name in ("keep", "general"))
        for _, _, dictionary in (keep, general):
            new = [word for word in dictionary if word not in place]
            place.update(zip(new, range(len(place), len(place) + len(new))))
            behind = np.append(behind, [len(tokenizer.encode(f"{word},")) for word in new]).astype(np.int32)
            last = np.append(last, [len(tokenizer.encode(word)) for word in new]).astype(np.int32)
            plain = np.append(plain, [is_plain(word) for word in new]).astype(bool)
        images.resize(len(place), refcheck=False)
        length, odd = np.zeros(len(keep[0]) - 1, np.int64), np.zeros(len(keep[0]) - 1, bool)
        for ends, indices, dictionary in (keep, general):
            word = np.array([place[each] for each in dictionary], np.int32)[indices]
            length += np.diff(np.append(0, np.cumsum(behind[word], dtype=np.int64))[ends])
            odd |= np.diff(np.append(0, np.cumsum(~plain[word]))[ends]) > 0
        post = np.repeat(np.arange(len(ends) - 1), np.diff(ends)) << 32  # of the general part, which came last
        images += np.bincount(unique_sorted(post | word) & 0xFFFFFFFF, minlength=len(place))  # an image counts once
        full = np.diff(ends) > 0
        final = word[ends[1:][full] - 1]
        length[full] += last[final] - behind[final]
        for row in np.flatnonzero(odd).tolist():
            length[row] = len(tokenizer.encode(", ".join(part["keep"][row].as_py() + part["general"][row].as_py())))
        lengths.append(np.bincount(length))
    longest = max((len(each) for each in lengths), default=0)
    total = sum((np.pad(each, (0, longest - len(each))) for each in lengths), np.zeros(longest, np.int64))
    tags = database.tags()
    meta = display_names(tags.filter(pc.equal(tags["type"], META))["name"].combine_chunks(), parameters).to_pylist()
    said = {
        *rows.creation_years(parameters),
        *parameters.quality,
        *(word for tags in parameters.ratings.values() for word in tags),
        *meta,
    }
    order = np.argsort(-images, kind="stable")
    names = list(place)
    top = [(names[word], int(images[word])) for word in order[: 50 * TOP].tolist() if names[word] not in said][:TOP]
    return {"general": top, "tokens": total.tolist()}


def most_frequent(path: Path) -> list[tuple[str, int]]:
    """The first names of a list of artists or characters."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8")).items())[:TOP]
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not a list of names and counts. Run the caption stage again.") from None


def metrics(figures: dict, parameters: Caption, length: int) -> dict:
    """The figures as DVC shows them: names and numbers only. `length` is the trainer's longest caption in tokens."""
    counts = np.array(figures["tokens"], np.int64)
    whole = np.cumsum(counts)
    places = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    long = int(counts[length + 1 :].sum())
    ratings = [*(", ".join(words) for words in parameters.ratings.values()), "none"]
    return {
        **{
            name: figures[name]
            for name in ("drawn", "selected", "trained", "dropped", "despite", "micro_batches", "steps")
        },
        "buckets": len(figures["buckets"]),
        "ratings": {name: sum(row) for name, row in zip(ratings, figures["ratings"], strict=True)},
        "quality": dict(zip([*parameters.quality, "none"], np.sum(figures["ratings"], axis=0).tolist(), strict=True)),
        "tokens": {name: int(np.searchsorted(whole, share * whole[-1])) for name, share in places.items()}
        | {"longest": len(counts) - 1, f"over_{length}": long},
    }


def _list_lengths(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ends, indices and dictionary of a list column of words."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    values = lists.values
    return lists.offsets.to_numpy(), values.indices.to_numpy(), values.dictionary.to_pylist()
