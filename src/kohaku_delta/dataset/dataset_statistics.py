"""Counts the dataset from what the stages wrote and from the database; nothing is estimated.

The functions give parts of one dictionary of plain numbers: report/dataset_plots.py draws it, published_counts.py
compares it, and `metrics` makes dataset.json of it.
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
from kohaku_delta.dataset.captions import display_names
from kohaku_delta.dataset.post_metadata import date_tags, post_metadata, reason_counts
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import Caption, Percentiles, Schedule
from kohaku_delta.regular_files import read_regular
from kohaku_delta.sdxl.tokenizer import ClipTokenizer, is_plain

TOP = 20  # names per kind
MAX_BUCKETS = 1 << 20  # bytes of bucket.txt
BUCKET = re.compile(r"bucket \d+: resolution \((\d+), (\d+)\), count: (\d+)")
META = 4  # type of a tag


def filter_counts(selection: Path, posts: Path, dropped: Path) -> dict:
    """How many posts were selected, trained on and dropped. Raises UserError unless selected = trained + dropped."""
    selected = parquet.read(selection, ["drawn"])
    trained, lost = parquet.read(posts, ["despite"]), parquet.read(dropped, ["reason"])
    if selected.num_rows != trained.num_rows + lost.num_rows:
        raise UserError(
            f"{selection} holds {selected.num_rows:,} posts, but {posts} and {dropped} hold {trained.num_rows:,} + "
            f"{lost.num_rows:,}. They are of different runs: run the filter stage again."
        )
    return {
        "drawn": pc.sum(selected["drawn"]).as_py(),
        "selected": selected.num_rows,
        "trained": trained.num_rows,
        "dropped": reason_counts(lost["reason"]),
        "despite": reason_counts(trained["despite"]),
    }


def metadata_counts(database: Database, ids: np.ndarray, parameters: Caption) -> dict:
    """Posts per year (0: unreadable), and per rating and quality (rows: ratings, then none; columns: qualities, then
    none). If the recipe takes thresholds from the database: quality_above, rating → percentile → those found.
    """
    metadata = post_metadata(database, ids, parameters)
    years, counts = np.unique(metadata.year, return_counts=True)
    ratings = np.array(list(parameters.ratings))
    row = np.where(metadata.rating[:, None] == ratings, np.arange(len(ratings)), len(ratings)).min(axis=1)
    column = np.where(metadata.quality < 0, len(parameters.quality), metadata.quality)
    matrix = np.zeros((len(ratings) + 1, len(parameters.quality) + 1), np.int64)
    np.add.at(matrix, (row, column), 1)
    figures = {"years": dict(zip(years.tolist(), counts.tolist(), strict=True)), "ratings": matrix.tolist()}
    if isinstance(parameters.quality_above, Percentiles):
        names = [f"p{percent}" for percent in parameters.quality_above.percentiles]
        figures["quality_above"] = {
            rating: dict(zip(names, thresholds, strict=True)) for rating, thresholds in metadata.thresholds.items()
        }
    return figures


def bucket_counts(path: Path, parameters: Schedule) -> dict:
    """Images per bucket [width, height, count], micro-batches per epoch, and steps."""
    buckets = []
    for line in read_regular(path, MAX_BUCKETS).decode("utf-8").splitlines():
        match = BUCKET.fullmatch(line)
        if not match:
            raise UserError(
                f"{path} has a line that is not of the form “bucket 0: resolution (256, 3328), count: 177”: "
                f"{line[:80]!r}. Run the schedule stage again."
            )
        buckets.append([int(number) for number in match.groups()])
    batches = sum(math.ceil(count / parameters.batch_size) for _, _, count in buckets)
    steps = parameters.epochs * math.ceil(batches / parameters.micro_batches)
    steps = min(steps, parameters.max_steps or steps)
    return {"buckets": buckets, "micro_batches": batches, "steps": steps}


class WordTable:
    """Every distinct word of the captions: how many tokens it has with a comma behind it and without, and whether
    cleaning (ftfy) leaves it as it is.
    """

    def __init__(self, tokenizer: ClipTokenizer):
        self.tokenizer = tokenizer
        self.index: dict[str, int] = {}
        self.with_comma = self.alone = np.zeros(0, np.int32)
        self.plain = np.zeros(0, bool)

    def add(self, words: list[str]) -> np.ndarray:
        """The index of each of these words (int32)."""
        new = [word for word in words if word not in self.index]
        self.index.update({word: len(self.index) + number for number, word in enumerate(new)})
        count = self.tokenizer.encode
        self.with_comma = np.append(self.with_comma, [len(count(f"{word},")) for word in new]).astype(np.int32)
        self.alone = np.append(self.alone, [len(count(word)) for word in new]).astype(np.int32)
        self.plain = np.append(self.plain, [is_plain(word) for word in new]).astype(bool)
        return np.array([self.index[word] for word in words], np.int32)


def tag_and_token_counts(captions: Path, database: Database, parameters: Caption, tokenizer: ClipTokenizer) -> dict:
    """The most frequent general tags, words of captions, and how many captions have which number of tokens.

    A caption's length is what the trainer's tokenizer makes of it before anything is shuffled or dropped. CLIP's
    tokenizer never joins what a space separates, so the length is the sum over the caption's words, each with its comma
    (which may join the punctuation before it), the last one without: every distinct word is tokenised once. A caption
    with a word that ftfy may change is tokenised whole, because ftfy looks at the whole text.
    """
    file = pq.ParquetFile(captions, read_dictionary=["keep.list.element", "general.list.element"])
    words = WordTable(tokenizer)
    images, lengths = np.zeros(0, np.int64), []
    for number in tqdm(range(file.num_row_groups), desc="captions", unit=" row groups", disable=None):
        part = file.read_row_group(number, columns=["keep", "general"])
        length, changed = np.zeros(part.num_rows, np.int64), np.zeros(part.num_rows, bool)
        for name in ("keep", "general"):
            ends, indices, dictionary = _word_lists(part[name])
            word = words.add(dictionary)[indices]
            length += _sums(words.with_comma[word], ends)
            changed |= _sums(~words.plain[word], ends) > 0
        images.resize(len(words.index), refcheck=False)
        post = np.repeat(np.arange(part.num_rows), np.diff(ends)) << 32  # of the general part, which came last
        images += np.bincount(unique_sorted(post | word) & 0xFFFFFFFF, minlength=len(images))  # an image counts once
        full = np.diff(ends) > 0
        final = word[ends[1:][full] - 1]
        length[full] += words.alone[final] - words.with_comma[final]
        for row in np.flatnonzero(changed).tolist():
            length[row] = len(tokenizer.encode(", ".join(part["keep"][row].as_py() + part["general"][row].as_py())))
        lengths.append(np.bincount(length))
    longest = max((len(counts) for counts in lengths), default=0)
    total = sum((np.pad(counts, (0, longest - len(counts))) for counts in lengths), np.zeros(longest, np.int64))
    tags = database.tags()
    meta = display_names(tags.filter(pc.equal(tags["type"], META))["name"].combine_chunks(), parameters).to_pylist()
    rated = (word for words in parameters.ratings.values() for word in words)
    not_general = {*date_tags(parameters), *parameters.quality, *rated, *meta}
    names = list(words.index)
    order = np.argsort(-images, kind="stable")[: 50 * TOP].tolist()
    top = [(names[word], int(images[word])) for word in order if names[word] not in not_general][:TOP]
    return {"general": top, "tokens": total.tolist()}


def _word_lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ends (n + 1), indices and dictionary of a list column of words."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    return lists.offsets.to_numpy(), lists.values.indices.to_numpy(), lists.values.dictionary.to_pylist()


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The sum of each run of values (int64)."""
    return np.diff(np.append(0, np.cumsum(values, dtype=np.int64))[ends])


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
    ratings = [*(", ".join(words) for words in parameters.ratings.values()), "none"]
    quality = np.sum(figures["ratings"], axis=0).tolist()
    percentiles = {
        name: int(np.searchsorted(whole, share * whole[-1]))
        for name, share in {"median": 0.5, "p90": 0.9, "p99": 0.99}.items()
    }
    kept = ("drawn", "selected", "trained", "dropped", "despite", "micro_batches", "steps", "quality_above")
    return {
        **{name: figures[name] for name in kept if name in figures},
        "buckets": len(figures["buckets"]),
        "ratings": {name: sum(row) for name, row in zip(ratings, figures["ratings"], strict=True)},
        "quality": dict(zip([*parameters.quality, "none"], quality, strict=True)),
        "tokens": percentiles | {"longest": len(counts) - 1, f"over_{length}": int(counts[length + 1 :].sum())},
    }
