"""Reads the rows of posts as the release's tool read them, into a few bytes per post.

Three parts of a caption come from a post's row: the tags of date, rating and quality. They also decide whether the tool
could write a caption at all: it failed if rating or fav_count was NULL where it needed them for the quality tag, and on
unknown ratings. For the filter stage, the row also gives the reasons against a post.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from kohaku_delta.danbooru.created_at import years
from kohaku_delta.danbooru.database import Database, positions_of
from kohaku_delta.errors import UserError
from kohaku_delta.params import Caption, Percentiles
from kohaku_delta.printing import format_some

NONE = -1  # no such tag, or NULL in the database
UNKNOWN = -2  # a rating that is not a whole number; ratings that are not in caption.ratings are unknown as well

# Reasons against a post in its row, in order of precedence. hidden: NULL md5 or file_url (for gold accounts only)
AGAINST = ("deleted", "banned", "hidden", "not an image")
# Why posts are dropped
REASONS = (*AGAINST, "missing from the tars", "caption impossible", "unreadable image", "extreme aspect ratio")

CAPTION_COLUMNS = {
    "created": "CAST(coalesce(created_at, '') AS TEXT)",
    # the tool looked ratings up in a Python list of four, which counts negative indices from its end
    "rating": f"""CASE WHEN rating IS NULL THEN {NONE}
        WHEN typeof(rating) != 'integer' OR rating < -4 THEN {UNKNOWN}
        WHEN rating < 0 THEN rating + 4 ELSE rating END""",
    "favourites": """CASE typeof(fav_count) WHEN 'integer' THEN fav_count
        WHEN 'real' THEN CAST(fav_count AS INTEGER) END""",
}
FILTER_COLUMNS = {
    "against": """CASE WHEN coalesce(is_deleted, 0) != 0 THEN 0 WHEN coalesce(is_banned, 0) != 0 THEN 1
        WHEN coalesce(md5, '') = '' OR coalesce(file_url, '') = '' THEN 2 ELSE -1 END""",
    "extension": "lower(CAST(coalesce(file_ext, '') AS TEXT))",
}


@dataclass(frozen=True)
class PostMetadata:
    """Arrays with one entry per post, in the order of the ids."""

    year: np.ndarray  # int16, of created_at; 0 if it is unreadable
    date: np.ndarray  # int8, index in `date_tags`, -1 for none
    rating: np.ndarray  # int8, a key of caption.ratings, -1 for none
    quality: np.ndarray  # int8, index in caption.quality, -1 for none
    possible: np.ndarray  # bool, whether the row allows a caption
    against: np.ndarray  # int8, index in AGAINST; -1 for none, or if it was not asked for
    thresholds: dict[int, list[int]]  # quality_thresholds, of all posts


def date_tags(parameters: Caption) -> list[str]:
    """The date tags: that of years before the first, then those of caption.years in order."""
    return [parameters.before_first_year or "", *parameters.years.values()]


def date_tag_indices(year: np.ndarray, parameters: Caption) -> np.ndarray:
    """Index of each year's tag in `date_tags` (int8, -1 for none). An unreadable date is year 0, which is before the
    first year.
    """
    index = np.searchsorted(np.array(list(parameters.years)), year, side="left") + 1
    index = np.where(index > len(parameters.years), NONE, index)
    early = NONE if parameters.before_first_year is None else 0
    return np.where(year < parameters.first_year, early, index).astype(np.int8)


def quality_thresholds(database: Database, parameters: Caption) -> dict[int, list[int]]:
    """Rating → what fav_count must exceed for each quality tag but the last, best first.

    With caption.quality_above.percentiles they are those of all posts of the database that have the rating and a
    fav_count, whatever is selected: np.percentile's linear interpolation, in whole numbers and rounded down, which
    decides for whole numbers as the fraction would. A rating without posts has no thresholds.
    """
    if not isinstance(parameters.quality_above, Percentiles):
        return parameters.quality_above

    def read(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        batch = batch.filter(batch["favourites"].is_valid())
        return batch["rating"].to_numpy().astype(np.int64), batch["favourites"].cast(pa.int64()).to_numpy()

    columns = {name: CAPTION_COLUMNS[name] for name in ("rating", "favourites")}
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    parts = [empty, *database.posts(read, ["rating", "fav_count"], **columns)]
    rating, favourites = (np.concatenate(part) for part in zip(*parts, strict=True))
    thresholds = {}
    for known in parameters.ratings:
        counts = np.sort(favourites[rating == known])
        if len(counts):
            thresholds[known] = [_percentile(counts, each) for each in parameters.quality_above.percentiles]
    return thresholds


def _percentile(values: np.ndarray, percent: int) -> int:
    """A percentile of ascending whole numbers, rounded down."""
    place, hundredths = divmod((len(values) - 1) * percent, 100)
    low, high = int(values[place]), int(values[min(place + 1, len(values) - 1)])
    return low + (high - low) * hundredths // 100


def quality_tag_indices(rating: np.ndarray, favourites: np.ndarray, thresholds_of: dict[int, list[int]]) -> np.ndarray:
    """Index in caption.quality (int8): how many of the rating's thresholds fav_count does not exceed; -1 for a rating
    without thresholds.
    """
    index = np.full(len(rating), NONE, np.int8)
    for known, thresholds in thresholds_of.items():
        rows = rating == known
        index[rows] = (favourites[rows, None] <= np.array(thresholds)[None, :]).sum(axis=1)
    return index


def reason_counts(reasons: pa.ChunkedArray) -> dict[str, int]:
    """How often each reason occurs, in the order of REASONS."""
    counts = {row["values"]: row["counts"] for row in reasons.drop_null().value_counts().to_pylist()}
    return {reason: counts[reason] for reason in REASONS if reason in counts}


def post_metadata(
    database: Database, ids: np.ndarray, parameters: Caption, images: list[str] | None = None
) -> PostMetadata:
    """The metadata of the posts `ids` (int64, ascending, distinct). `against` is computed only if `images`, the
    extensions that count as an image, is given.

    Raises UserError for ids that the database does not have.
    """
    ratings, thresholds = np.array(list(parameters.ratings)), quality_thresholds(database, parameters)
    limit = np.iinfo(np.int64).max if parameters.no_quality_above_id is None else parameters.no_quality_above_id
    date, rating, quality, against = (np.full(len(ids), NONE, np.int8) for _ in range(4))
    year = np.zeros(len(ids), np.int16)
    possible, found = np.zeros(len(ids), bool), np.zeros(len(ids), bool)

    def read(batch: pa.RecordBatch) -> int:
        rows = positions_of(ids, batch["id"].to_numpy())
        batch, rows = batch.filter(pa.array(rows >= 0)), rows[rows >= 0]
        if not len(rows):
            return 0
        needs_quality = batch["id"].to_numpy() <= limit
        ratings_read = batch["rating"].to_numpy()
        known = np.isin(ratings_read, ratings)
        has_favourites = batch["favourites"].is_valid().to_numpy(zero_copy_only=False)
        favourites = batch["favourites"].cast(pa.int64()).fill_null(0).to_numpy()
        year[rows] = years_read = years(batch["created"].cast(pa.binary()))
        date[rows] = date_tag_indices(years_read, parameters)
        rating[rows] = np.where(known, ratings_read, NONE)
        quality[rows] = np.where(needs_quality, quality_tag_indices(ratings_read, favourites, thresholds), NONE)
        possible[rows] = np.where(needs_quality, known & has_favourites, known | (ratings_read == NONE))
        if images is not None:
            is_image = pc.is_in(batch["extension"].cast(pa.string()), pa.array(images)).to_numpy(zero_copy_only=False)
            reason = batch["against"].to_numpy()
            against[rows] = np.where((reason == NONE) & ~is_image, AGAINST.index("not an image"), reason)
        found[rows] = True
        return len(rows)

    columns, expressions = ["created_at", "rating", "fav_count"], CAPTION_COLUMNS
    if images is not None:
        columns = [*columns, "is_deleted", "is_banned", "md5", "file_url", "file_ext"]
        expressions = CAPTION_COLUMNS | FILTER_COLUMNS
    with tqdm(total=len(ids), desc="posts", unit=" posts", unit_scale=True, disable=None) as bar:
        for count in database.posts(read, columns, **expressions):
            bar.update(count)
    if not found.all():
        missing = ids[~found]
        raise UserError(
            f"The database {database.path} has no post {format_some(map(str, missing), 5)} ({len(missing):,} of the "
            f"{len(ids):,} posts asked for). The list of posts belongs to another database."
        )
    return PostMetadata(year, date, rating, quality, possible, against, thresholds)
