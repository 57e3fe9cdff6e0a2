"""Invariant: what a post's own row says, as the release's tool read it, for any posts, in a few bytes a post.

Three things of a caption come from the row: the date tag, the rating's tags and the quality tag. They also decide
whether the tool could write a caption at all: it failed where quality was asked for and rating or fav_count was NULL,
and on a rating that it did not know. The row also says what speaks against a post: that is asked for by the filter, in
the same reading.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta.danbooru.created_at import years
from kohaku_delta.danbooru.database import Database, positions_of
from kohaku_delta.errors import UserError
from kohaku_delta.params import Caption

NONE = -1  # no such tag, or NULL in the database
UNKNOWN = -2  # a rating that is no whole number; one that is not in caption.ratings is unknown as well

# Reasons that a row gives against its post, first to last; hidden: NULL md5 or file_url, for gold accounts only.
AGAINST = ("deleted", "banned", "hidden", "not an image")
REASONS = (*AGAINST, "missing from the tars", "caption impossible", "unreadable image")  # all why a post is dropped

SAID = {
    "created": "CAST(coalesce(created_at, '') AS TEXT)",
    # the tool looked ratings up in a Python list of four, which counts negative ones from its end
    "rating": f"CASE WHEN rating IS NULL THEN {NONE} WHEN typeof(rating) != 'integer' OR rating < -4 THEN {UNKNOWN} WHEN rating < 0 THEN rating + 4 ELSE rating END",
    "favourites": "CASE typeof(fav_count) WHEN 'integer' THEN fav_count WHEN 'real' THEN CAST(fav_count AS INTEGER) END",
}
JUDGED = {
    "gone": "CASE WHEN coalesce(is_deleted, 0) != 0 THEN 0 WHEN coalesce(is_banned, 0) != 0 THEN 1 "
    "WHEN coalesce(md5, '') = '' OR coalesce(file_url, '') = '' THEN 2 ELSE -1 END",
    "extension": "lower(CAST(coalesce(file_ext, '') AS TEXT))",
}


@dataclass(frozen=True)
class PostMetadata:
    """Of each post, in the order of the given ids: all arrays have that length."""

    year: np.ndarray  # int16, of created_at; 0 where it is unreadable
    date: np.ndarray  # int8, place among the date tags of `dates`, -1 for none
    rating: np.ndarray  # int8, a key of caption.ratings, -1 for none
    quality: np.ndarray  # int8, place in caption.quality, -1 for none
    possible: np.ndarray  # bool, whether the row allows a caption
    against: np.ndarray  # int8, place in AGAINST, -1 for none or where nobody asked


def creation_years(parameters: Caption) -> list[str]:
    """The date tags: that of years before the first, then the table's in order."""
    return [parameters.before_first_year or "", *parameters.years.values()]


def year_tag_indices(year: np.ndarray, parameters: Caption) -> np.ndarray:
    """Place of each year's tag in `dates` (int8, -1 for none). An unreadable date is year 0, and so comes before the
    first year.
    """
    place = np.searchsorted(np.array(list(parameters.years)), year, side="left") + 1
    place = np.where(place > len(parameters.years), NONE, place)
    early = NONE if parameters.before_first_year is None else 0
    return np.where(year < parameters.first_year, early, place).astype(np.int8)


def quality_tag_indices(rating: np.ndarray, favourites: np.ndarray, parameters: Caption) -> np.ndarray:
    """Place in caption.quality (int8): how many of the rating's thresholds fav_count does not exceed. -1 for a rating
    without thresholds.
    """
    place = np.full(len(rating), NONE, np.int8)
    for known, thresholds in parameters.quality_above.items():
        rows = rating == known
        place[rows] = (favourites[rows, None] <= np.array(thresholds)[None, :]).sum(axis=1)
    return place


def post_metadata(
    database: Database, ids: np.ndarray, parameters: Caption, images: list[str] | None = None
) -> PostMetadata:
    """What the rows of the posts `ids` (int64, ascending, distinct) say. `images` (extensions) asks for `against` too.

    Refuses ids that the database does not hold.
    """
    known = np.array(list(parameters.ratings))
    limit = np.iinfo(np.int64).max if parameters.no_quality_above_id is None else parameters.no_quality_above_id
    date, rating, quality, against = (np.full(len(ids), NONE, np.int8) for _ in range(4))
    year = np.zeros(len(ids), np.int16)
    possible, found = np.zeros(len(ids), bool), np.zeros(len(ids), bool)

    def read(batch: pa.RecordBatch) -> int:
        place = positions_of(ids, batch["id"].to_numpy())
        if (place < 0).any():
            batch = batch.filter(pa.array(place >= 0))
            place = place[place >= 0]
        if not len(place):
            return 0
        judged = batch["id"].to_numpy() <= limit
        given = batch["rating"].to_numpy()
        counted = batch["favourites"].is_valid().to_numpy(zero_copy_only=False)
        favourites = batch["favourites"].cast(pa.int64()).fill_null(0).to_numpy()
        year[place] = written = years(batch["created"].cast(pa.binary()))
        date[place] = year_tag_indices(written, parameters)
        rating[place] = np.where(np.isin(given, known), given, NONE)
        quality[place] = np.where(judged, quality_tag_indices(given, favourites, parameters), NONE)
        possible[place] = (np.isin(given, known) & counted) | (~judged & (np.isin(given, known) | (given == NONE)))
        if images is not None:
            image = pc.is_in(batch["extension"].cast(pa.string()), pa.array(images)).to_numpy(zero_copy_only=False)
            gone = batch["gone"].to_numpy()
            against[place] = np.where((gone == NONE) & ~image, AGAINST.index("not an image"), gone)
        found[place] = True
        return len(place)

    columns, expressions = ["created_at", "rating", "fav_count"], SAID
    if images is not None:
        columns, expressions = [*columns, "is_deleted", "is_banned", "md5", "file_url", "file_ext"], SAID | JUDGED
    with tqdm(total=len(ids), desc="posts", unit=" posts", unit_scale=True, disable=None) as bar:
        for count in database.posts(read, columns, **expressions):
            bar.update(count)
    if not found.all():
        absent = ids[~found]
        raise UserError(
            f"The database {database.path} has no post {', '.join(map(str, absent[:5]))}{' …' if len(absent) > 5 else ''} "
            f"({len(absent):,} of the {len(ids):,} posts asked for). The list of posts belongs to another database."
        )
    return PostMetadata(year, date, rating, quality, possible, against)
