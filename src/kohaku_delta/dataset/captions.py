"""Writes the captions of the release, character for character: keep + ", |||" + general, as HakuBooru of February 2024
wrote them.

keep is special tags, characters, copyrights (series), artists; general is the other general tags, the meta tags that
remain, and the tags of date, rating and quality. Within a class the order is posttagrelation.id ascending. A pair that
the database repeats is repeated: the tool joined three tables without asking for distinct rows. A tag of a caption is
one row (post, class, word) here, so that one radix sort writes 8,192 captions at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_delta.danbooru import post_tags
from kohaku_delta.danbooru.database import Database, positions_of, unique_sorted
from kohaku_delta.dataset.post_metadata import NONE, PostMetadata, date_tags, post_metadata
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.params import Caption

SCHEMA = pa.schema(
    [
        ("post_id", pa.int64()),
        ("keep", pa.list_(pa.string())),
        ("general", pa.list_(pa.string())),
        ("caption", pa.string()),
    ]
)
WORDS = pa.list_(pa.dictionary(pa.int32(), pa.string()))
# SCHEMA, before a file is written
STORED = pa.schema([("post_id", pa.int64()), ("keep", WORDS), ("general", WORDS), ("caption", pa.string())])

# classes of tags, in the order in which a caption has them
SPECIAL, CHARACTER, COPYRIGHT, ARTIST, GENERAL, META = range(6)
LEFT_OUT, BROKEN = 6, 7  # not in captions; makes a caption impossible (Database.broken_tags)
# by database type 0 … 4, then -1, -2
CLASS_OF_TYPE = np.array([GENERAL, ARTIST, CHARACTER, COPYRIGHT, META, LEFT_OUT, BROKEN], np.uint8)


def display_names(names: pa.StringArray, parameters: Caption) -> pa.StringArray:
    """Names of tags as they are written in captions."""
    short = pc.less_equal(pc.utf8_length(names), parameters.underscores_kept_up_to)
    return pc.if_else(short, names, pc.replace_substring(names, "_", " "))


def _contains_any(names: pa.StringArray, parts: list[str]) -> np.ndarray:
    """Which names contain one of these texts (bool)."""
    found = np.zeros(len(names), bool)
    for part in parts:
        found |= pc.match_substring(names, part).to_numpy(zero_copy_only=False)
    return found


class Vocabulary:
    """Every word that a caption can contain: the database's tags in the order of their ids, then the words of dates,
    ratings and quality. A word is an index in `text`.
    """

    def __init__(self, database: Database, parameters: Caption):
        tags = database.tags()
        kind, name = tags["type"].to_numpy(), tags["name"].combine_chunks()
        self.ids = tags["id"].to_numpy()
        self.classes = CLASS_OF_TYPE[np.where(kind >= 0, kind, 4 - kind)]
        self.classes[~tags["named"].to_numpy() & (kind != NONE)] = BROKEN
        usable = (self.classes != LEFT_OUT) & (self.classes != BROKEN)

        dropped_meta, dropped_artists = (
            _contains_any(name, parts) for parts in (parameters.dropped_meta, parameters.dropped_artists)
        )
        blank = pc.equal(pc.utf8_trim_whitespace(name), "").to_numpy(zero_copy_only=False)
        special = pc.is_in(name, pa.array(parameters.special, pa.string())).to_numpy(zero_copy_only=False)
        self.classes[(self.classes == GENERAL) & special] = SPECIAL
        dropped = (self.classes == META) & dropped_meta | (self.classes == ARTIST) & dropped_artists
        self.classes[usable & (blank | dropped)] = LEFT_OUT

        tail = [
            *date_tags(parameters),
            *(word for words in parameters.ratings.values() for word in words),
            *parameters.quality,
        ]
        self.text = pa.concat_arrays([display_names(name, parameters), pa.array(tail, pa.string())])
        # captions are joined from: each word with a comma, each word without (the last one), the separator after keep,
        # and the separator after nothing
        with_comma = pc.binary_join_element_wise(self.text, ", ", "")
        separators = pa.array([parameters.separator, ", " + parameters.separator], pa.string())
        self.pieces = pa.concat_arrays([with_comma, self.text, separators])
        self.date = len(name)  # first words of dates, of each rating, and of quality
        self.rating, first = {}, self.date + len(date_tags(parameters))
        for rating, words in parameters.ratings.items():
            self.rating[rating] = range(first, first + len(words))
            first += len(words)
        self.quality = first

    def metadata_tags(self, metadata: PostMetadata, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The words of date, rating and quality of posts start … stop - 1: how many each post has, and the words, post
        by post.
        """
        date, rating, quality = (
            values[start:stop].astype(np.int32) for values in (metadata.date, metadata.rating, metadata.quality)
        )
        columns = [np.where(date != NONE, self.date + date, NONE)]
        for number in range(max(map(len, self.rating.values()), default=0)):
            words = np.full(128, NONE, np.int32)
            for known, own in self.rating.items():
                words[known] = own[number] if number < len(own) else NONE
            columns.append(np.where(rating != NONE, words[rating], NONE))
        columns.append(np.where(quality != NONE, self.quality + quality, NONE))
        words = np.stack(columns, axis=1, dtype=np.int32)
        return (words != NONE).sum(axis=1), words[words != NONE]

    def join(self, word: np.ndarray, ends: np.ndarray, middle: np.ndarray) -> pa.StringArray:
        """keep joined by ", ", then ", ", the separator, and general joined by ", " (nothing between separator and
        general).

        word (int32) is changed; it holds the words of each caption and, at `middle`, a place for the separator. `ends`
        (n + 1) are the boundaries of captions.
        """
        words = len(self.text)
        last = ends[1:] - 1
        word[last] += words
        word[middle] = 2 * words + (middle == ends[:-1])
        letters = self.pieces.take(pa.array(word))
        cuts = np.frombuffer(letters.buffers()[1], np.int32, len(word) + 1)[ends]
        return pa.StringArray.from_buffers(len(last), pa.py_buffer(cuts), letters.buffers()[2])


@dataclass(frozen=True)
class CaptionChunk:
    """Captions of the posts `id` (n). keep and general are words of the vocabulary in the order of the caption; *_ends
    (int32, n + 1) are the boundaries of posts.
    """

    id: np.ndarray
    keep: np.ndarray
    keep_ends: np.ndarray
    general: np.ndarray
    general_ends: np.ndarray
    caption: pa.StringArray
    named: np.ndarray  # words that are artists or characters, each once per post that has it


def write_chunk(
    chunk: post_tags.Chunk, ids: np.ndarray, metadata: PostMetadata, vocabulary: Vocabulary
) -> CaptionChunk:
    """The captions of one chunk of the posts `ids`."""
    count, possible = chunk.stop - chunk.start, metadata.possible[chunk.start : chunk.stop]
    post, word, classes = chunk.post, chunk.tag, vocabulary.classes.take(chunk.tag)
    unused = np.flatnonzero(classes >= LEFT_OUT)
    if (classes[unused] == BROKEN).any() or not possible.all():
        bad = np.unique(np.r_[post[classes == BROKEN].astype(np.int64), np.flatnonzero(~possible)])
        examples = ", ".join(str(ids[chunk.start + place]) for place in bad[:5])
        raise UserError(
            f"No caption can be written for post {examples}: its rating, fav_count or one of its tags is NULL or "
            "unknown. The filter stage drops such posts."
        )
    group = post << np.uint16(3) | classes
    word = word.take(np.argsort(group, kind="stable"))
    counts = np.bincount(group, minlength=count * 8).reshape(count, 8)  # tags of each post and class
    word = word[np.repeat(np.tile(np.arange(8) < LEFT_OUT, count), counts.reshape(-1))] if len(unused) else word
    counts = counts[:, :LEFT_OUT]
    is_name = np.repeat(np.tile(np.isin(np.arange(LEFT_OUT), (CHARACTER, ARTIST)), count), counts.reshape(-1))
    named = np.repeat(np.arange(count) << 32, counts[:, CHARACTER] + counts[:, ARTIST]) | word[is_name]

    # each caption: kept words, a place for the separator, general words, and the words of the metadata at the end
    tails, tail = vocabulary.metadata_tags(metadata, chunk.start, chunk.stop)
    keeps, generals = counts[:, :GENERAL].sum(axis=1), counts[:, GENERAL:].sum(axis=1)
    ends = _ends(keeps + 1 + generals + tails)
    middle = ends[:-1] + keeps
    parts = np.stack([keeps, np.ones_like(keeps), generals, tails], axis=1).reshape(-1)
    all_words = np.empty(ends[-1], np.int32)
    is_tag = np.repeat(np.tile([True, False, True, False], count), parts)
    all_words[is_tag] = word
    all_words[np.repeat(np.tile([False, False, False, True], count), parts)] = tail
    keep = word[np.repeat(np.tile([True, False], count), np.stack([keeps, generals], axis=1).reshape(-1))]
    general = all_words[np.repeat(np.tile([False, False, True, True], count), parts)]
    caption = vocabulary.join(all_words, ends, middle)
    return CaptionChunk(
        ids[chunk.start : chunk.stop],
        keep,
        _ends(keeps),
        general,
        _ends(generals + tails),
        caption,
        unique_sorted(named) & 0xFFFFFFFF,
    )


def _ends(lengths: np.ndarray) -> np.ndarray:
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return ends


def iter_captions(
    database: Database, ids: np.ndarray, parameters: Caption, scratch=None
) -> Iterator[tuple[Vocabulary, CaptionChunk]]:
    """Captions of the posts `ids` (int64, ascending, distinct), 8,192 at a time. `scratch` is the folder for temporary
    files.
    """
    metadata = post_metadata(database, ids, parameters)
    vocabulary = Vocabulary(database, parameters)
    for written in post_tags.map_chunks(
        database, ids, vocabulary.ids, lambda chunk: write_chunk(chunk, ids, metadata, vocabulary), scratch
    ):
        yield vocabulary, written


def as_table(vocabulary: Vocabulary, parts: list[CaptionChunk]) -> pa.Table:
    """Captions as a table of STORED: the lists refer to one dictionary of words, and so does the parquet file."""
    used = np.zeros(len(vocabulary.text), bool)
    for part in parts:
        used[part.keep] = used[part.general] = True
    words_used = vocabulary.text.filter(pa.array(used)).dictionary_encode()  # names can be equal: a_b_c, a b c
    places = np.zeros(len(used), np.int32)
    places[used] = words_used.indices.to_numpy()

    def lists(name: str) -> pa.ListArray:
        words = np.concatenate([np.empty(0, np.int32), *(getattr(part, name) for part in parts)])
        ends = np.cumsum(
            np.concatenate([[0], *(np.diff(getattr(part, f"{name}_ends")) for part in parts)]), dtype=np.int32
        )
        return pa.ListArray.from_arrays(
            pa.array(ends), pa.DictionaryArray.from_arrays(pa.array(places[words]), words_used.dictionary)
        )

    ids = np.concatenate([np.empty(0, np.int64), *(part.id for part in parts)])
    captions = pa.chunked_array([part.caption for part in parts], pa.string())
    return pa.table([pa.array(ids), lists("keep"), lists("general"), captions], schema=STORED)


def write_captions(database: Database, ids, parameters: Caption, path, counts=None) -> None:
    """The captions of a list of posts (any order, repeats count once) as a parquet file of SCHEMA, post_id ascending,
    in bounded memory.

    `counts` (tag_counts.TagCounter) counts every artist and character.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with parquet.open_writer(path, STORED, plain=["caption"]) as append:
        parts: list[CaptionChunk] = []
        for vocabulary, written in iter_captions(database, unique_sorted(ids), parameters, Path(path).parent):
            parts.append(written)
            if counts is not None:
                counts.add(written.named, vocabulary)
            if sum(len(part.id) for part in parts) >= parquet.ROW_GROUP:
                append(as_table(vocabulary, parts))
                parts = []
        if parts:
            append(as_table(vocabulary, parts))


def caption_posts(database: Database, ids, parameters: Caption) -> pa.Table:
    """The captions of a list of posts (any order, repeats count once) as one table of SCHEMA, post_id ascending."""
    tables = [SCHEMA.empty_table()]
    for vocabulary, part in iter_captions(database, unique_sorted(ids), parameters):
        keep, general = (
            pa.ListArray.from_arrays(pa.array(ends), vocabulary.text.take(pa.array(words)))
            for ends, words in ((part.keep_ends, part.keep), (part.general_ends, part.general))
        )
        tables.append(pa.table([pa.array(part.id), keep, general, part.caption], schema=SCHEMA))
    return pa.concat_tables(tables).combine_chunks()


def captionable(
    database: Database, ids: np.ndarray, parameters: Caption, metadata: PostMetadata | None = None
) -> np.ndarray:
    """Whether the release's tool could caption each of the posts `ids` (int64, ascending, distinct) (bool). `metadata`
    of the same posts is read if it is not given.
    """
    possible = (metadata or post_metadata(database, ids, parameters)).possible.copy()
    broken = positions_of(ids, database.posts_of(database.broken_tags()))
    possible[broken[broken >= 0]] = False
    return possible
