"""The miniature's posts; each is a function of its id. Only this module decides which tar holds an image, and which
posts are broken and how.

About 3,000 posts with ids over danbooru2023's real range, on four residues mod 1000, so that nine tars hold them.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np

from make_miniature.drawing import Scene
from make_miniature.scenes import compose
from make_miniature.words import ARTIST, CHARACTER, COPYRIGHT, GENERAL, META, META_WORDS, chance, draws, pick

SEED = 2023
RESIDUES = (4, 137, 512, 999)
RANGES = ((1, 3_000_000, 900), (3_000_000, 5_000_000, 900), (5_000_000, 7_200_000, 1200))
RECENT, LATEST = 6_000_000, 7_120_000  # the first id of the recent tars, of the add-on tar 2000

# When an id was uploaded: (id, day), straight lines between.
CALENDAR = (
    (1, "2005-05-24"),
    (400_000, "2009-02-01"),
    (800_000, "2010-12-01"),
    (1_300_000, "2013-01-15"),
    (1_900_000, "2015-02-10"),
    (2_600_000, "2017-02-01"),
    (3_000_000, "2018-02-03"),
    (4_000_000, "2020-07-20"),
    (5_000_000, "2022-01-03"),
    (6_000_000, "2023-01-29"),
    (7_000_000, "2023-12-27"),
    (7_200_000, "2024-02-02"),
)
QUALITY_ABOVE = ((37, 22, 16, 8, 3, 1), (81, 44, 30, 15, 6, 2), (182, 105, 75, 38, 18, 8), (262, 151, 106, 52, 22, 9))

# The awkward ones: how many in each range.
AWKWARD = {
    "deleted": 8,
    "deleted_kept": 3,
    "banned": 3,
    "banned_kept": 3,
    "hidden": 6,
    "hidden_md5": 2,
    "gif": 4,
    "mp4": 4,
    "webm": 1,
    "zip": 1,
    "swf": 1,
    "missing": 8,
    "cut_body": 2,
    "cut_head": 1,
    "empty": 1,
    "no_rating": 4,
    "no_date": 2,
    "odd_date": 1,
    "future": 2,
    "repeated": 8,
    "no_tags": 3,
    "file_words_only": 1,
    "alpha": 3,
    "tiny": 2,
    "year_end": 3,
}
NO_FILE = {"deleted", "banned", "hidden", "gif", "mp4", "webm", "zip", "swf", "missing"}


@dataclass
class Post:
    id: int
    created_at: str
    rating: int | None
    fav_count: int
    score: int
    down_score: int
    tags: list[tuple[str, int]]  # (name, type), in the order of posttagrelation.id
    scene: Scene
    ext: str
    awkward: str = ""
    has_children: bool = False
    parent_id: int | None = None
    repeated: list[tuple[str, int]] = field(default_factory=list)

    @property
    def md5(self) -> str | None:
        return (
            None
            if self.awkward in ("hidden", "hidden_md5")
            else hashlib.md5(f"miniature {self.id}".encode()).hexdigest()
        )

    @property
    def tar(self) -> int | None:
        """The number of the tar that holds the image; None if none does."""
        if self.awkward in NO_FILE:
            return None
        return 2000 if self.id >= LATEST else self.id % 1000 + (1000 if self.id >= RECENT else 0)


def uploaded(id: int) -> datetime:
    for (low, first), (high, last) in pairwise(CALENDAR):
        if id <= high:
            start, end = datetime.fromisoformat(first), datetime.fromisoformat(last)
            seconds = int((end - start).total_seconds()) * (id - low) // (high - low)
            return start + timedelta(seconds=seconds, milliseconds=id * 7919 % 1000)


def written(moment: datetime) -> str:
    """As danbooru writes it, with New York's UTC offset (daylight saving time by month, approximately)."""
    offset = "-04:00" if 4 <= moment.month <= 10 else "-05:00"
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}{offset}"


def sides(rng) -> tuple[int, int]:
    """Width and height in pixels, 64–320: mostly portraits, some squares and landscapes, a few very long."""
    ratio = pick(
        rng,
        {
            (1, 1): 5,
            (3, 4): 5,
            (2, 3): 6,
            (4, 3): 3,
            (3, 2): 2,
            (4, 5): 3,
            (16, 9): 2,
            (9, 16): 2,
            (1, 2): 1,
            (2, 1): 1,
            (1, 4): 0.4,
            (4, 1): 0.4,
            (1, 3): 0.3,
        },
    )
    shorter = int(rng.integers(64, 104)) if ratio not in ((1, 4), (4, 1), (1, 3)) else int(rng.integers(64, 80))
    return max(64, shorter * ratio[0] // min(ratio)), max(64, shorter * ratio[1] // min(ratio))


def favourites(rng, rating: int) -> tuple[int, int]:
    """(fav_count, finish 0 … 6): a class of quality first, then a count inside it; a third sits exactly on the class's
    upper threshold.
    """
    finish = pick(rng, {6: 6, 5: 10, 4: 12, 3: 24, 2: 24, 1: 14, 0: 10})
    above = QUALITY_ABOVE[rating]
    low = above[6 - finish] + 1 if finish else 0
    high = above[5 - finish] if finish < 6 else 4 * above[0]
    if finish < 6 and chance(rng, 0.3):
        return high, finish
    return int(rng.integers(low, high + 1)), finish


def post(id: int, awkward: str = "") -> Post:
    rng = draws(SEED, id)
    moment = uploaded(id)
    if awkward == "year_end":  # the year counts as written, with its offset; in UTC it would be the next one
        moment = datetime(pick(rng, {2010: 1, 2014: 1, 2017: 1, 2020: 1}), 12, 31, 23, 30)
    if awkward == "future":
        moment = datetime(2025, 3, 1, 12)
    age = sum(moment.year <= last for last in (2020, 2017, 2014, 2010))
    rating = pick(rng, {0: 45, 1: 35, 2: 12, 3: 8})
    fav_count, finish = favourites(rng, rating)
    width, height = (int(rng.integers(9, 30)), int(rng.integers(9, 30))) if awkward == "tiny" else sides(rng)
    whole = compose(rng, width, height)
    scene = replace(whole.scene, finish=finish, age=age)
    tags = [(word, GENERAL) for word in whole.general] + [(word, ARTIST) for word in whole.artists]
    tags += [(word, CHARACTER) for word in whole.characters] + [(word, COPYRIGHT) for word in whole.copyrights]
    meta = [word for word, weight in META_WORDS.items() if chance(rng, weight / 100)]
    meta += {"gif": ["animated", "animated_gif"], "mp4": ["animated", "video"], "webm": ["animated", "video"]}.get(
        awkward, []
    )
    tags += [(word, META) for word in meta]
    tags = [tags[place] for place in sorted(range(len(tags)), key=rng.random(len(tags)).tolist().__getitem__)]
    if awkward == "no_tags":
        tags = []
    if awkward == "file_words_only":
        tags = [("highres", META), ("bad_id", META)]
    if awkward == "alpha":
        tags.append(("transparent_background", GENERAL))
    if awkward == "future":
        rating = 0
    score = fav_count * 3 // 4 + int(rng.integers(0, 4))
    return Post(
        id=id,
        created_at={"no_date": "", "odd_date": "unknown"}.get(awkward)
        if awkward in ("no_date", "odd_date")
        else written(moment),
        rating=None if awkward == "no_rating" else rating,
        fav_count=fav_count,
        score=score,
        down_score=int(rng.integers(0, 3)),
        tags=tags,
        scene=scene,
        ext=awkward
        if awkward in ("gif", "mp4", "webm", "zip", "swf")
        else pick(rng, {"jpg": 60, "png": 38, "jpeg": 2}),
        awkward=awkward,
        has_children=chance(rng, 0.05),
        parent_id=id - 1000 if chance(rng, 0.05) and id > 1000 else None,
        repeated=tags[:2] if awkward == "repeated" else [],
    )


def ids(number: int) -> list[int]:
    """The ids of one range, ascending, spread over the residues."""
    low, high, count = RANGES[number]
    found = []
    for residue in RESIDUES:
        fitting = np.arange(low + (residue - low) % 1000, high, 1000)
        order = draws(SEED, number, residue).random(len(fitting)).argsort(kind="stable")
        found += fitting[order[: count // len(RESIDUES)]].tolist()
    return sorted(found)


def posts() -> list[Post]:
    """All posts, ascending by id."""
    found = []
    for number in range(len(RANGES)):
        numbers = ids(number)
        kinds = [kind for kind, count in AWKWARD.items() for _ in range(count)]
        places = draws(SEED, number, 1).random(len(numbers)).argsort(kind="stable")[: len(kinds)].tolist()
        awkward = dict(zip(places, kinds, strict=True))
        found += [post(id, awkward.get(place, "")) for place, id in enumerate(numbers)]
    return found


def popularity(all_posts: list[Post]) -> Counter:
    return Counter(tag for each in all_posts for tag in each.tags)
