"""Counts how often each artist and each character occurs in the training images, as two separate lists.

An image counts once for a name, even if the database repeats the pair. Names are those of the captions (what a user
types into a prompt), most frequent first, then by code point.
"""

import json

import numpy as np
import pyarrow as pa

from kohaku_delta import atomic_files
from kohaku_delta.dataset.captions import ARTIST, CHARACTER, Vocabulary


class TagCounter:
    """Images per tag, added up chunk by chunk as captions are written."""

    def __init__(self) -> None:
        self.images = np.zeros(0, np.int64)
        self.vocabulary: Vocabulary | None = None

    def add(self, named: np.ndarray, vocabulary: Vocabulary) -> None:
        """`named`: positions of artists and characters in the vocabulary, each once per image."""
        if self.vocabulary is None:
            self.images, self.vocabulary = np.zeros(len(vocabulary.ids), np.int64), vocabulary
        self.images += np.bincount(named, minlength=len(self.images))

    def artists(self) -> dict[str, int]:
        """Artist's name → images, most frequent first."""
        return self._counts_of_kind(ARTIST)

    def characters(self) -> dict[str, int]:
        """Character's name → images, most frequent first."""
        return self._counts_of_kind(CHARACTER)

    def _counts_of_kind(self, kind: int) -> dict[str, int]:
        if self.vocabulary is None:
            return {}
        tags = np.flatnonzero((self.vocabulary.classes == kind) & (self.images > 0))
        table = pa.table({"name": self.vocabulary.text.take(pa.array(tags)), "images": self.images[tags]})
        table = table.group_by("name", use_threads=False).aggregate([("images", "sum")])
        table = table.sort_by([("images_sum", "descending"), ("name", "ascending")])
        return dict(zip(table["name"].to_pylist(), table["images_sum"].to_pylist(), strict=True))


def write_tag_counts(counts: dict[str, int], path) -> None:
    """Writes one JSON object, one name per line."""
    with atomic_files.atomic_write(path, "w") as file:
        json.dump(counts, file, ensure_ascii=False, indent=1)
        file.write("\n")
