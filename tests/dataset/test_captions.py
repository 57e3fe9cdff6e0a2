import json
import sqlite3
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danbooru_factory import ARTIST, CHARACTER, COPYRIGHT, GENERAL, META, caption, write_database
from kohaku_delta import params
from kohaku_delta.danbooru import database, post_tags
from kohaku_delta.danbooru.database import Database
from kohaku_delta.dataset import captions, dataset_statistics, post_metadata, tag_counts
from kohaku_delta.errors import UserError
from kohaku_delta.formats import parquet
from kohaku_delta.parallel import ordered_map

TAGS = [
    (3, "1girl", GENERAL), (5, "long_hair", GENERAL), (6, "^_^", GENERAL), (7, "a_b", META), (8, "highres", META), (9,
    "bad_id", META),
    (10, "rice_shower_(umamusume)", CHARACTER), (11, "umamusume", COPYRIGHT), (12, "some_artist", ARTIST), (13,
    "1girl_(series)", COPYRIGHT),
    (14, "solo", GENERAL), (15, "name,_with_comma", GENERAL), (16, "a|||b", GENERAL), (17, "初音ミク_(例)", CHARACTER),
    (18, "photo_(medium)", META),
    (19, "6+boys", GENERAL), (20, "other_artist", ARTIST), (21, "\u3000 \x1c", GENERAL), (22, "é_e", GENERAL), (23,
    None, GENERAL), (24, "odd_type", 9),
    (25, "no_type", None), (26, "male_focus", ARTIST),
]  # fmt: skip


@pytest.fixture(scope="module")
def parameters():
    return params.load("params.yaml").caption


def check(path, ids, parameters):
    written = captions.caption_posts(Database(path), ids, parameters)
    with sqlite3.connect(path) as connection:
        expected = [caption(connection, post, parameters) for post in sorted(ids)]
    connection.close()
    assert written["post_id"].to_pylist() == sorted(ids)
    assert list(zip(*(written[name].to_pylist() for name in ("keep", "general", "caption")), strict=True)) == expected


def test_a_caption_is_the_one_that_the_release_wrote(tmp_path, parameters):
    pairs = [(1, 5), (1, 12), (1, 11), (1, 3), (1, 10), (1, 8), (1, 14), (1, 6), (1, 9)]
    path = write_database(tmp_path / "a.db", [{"id": 1, "rating": 3, "fav_count": 300}], TAGS, pairs)
    written = captions.caption_posts(Database(path), [1], parameters)
    assert written["caption"].to_pylist() == [
        "1girl, rice shower (umamusume), umamusume, some artist, |||"
        "long hair, solo, ^_^, highres, recent, explicit, nsfw, masterpiece"
    ]
    assert written["keep"].to_pylist() == [["1girl", "rice shower (umamusume)", "umamusume", "some artist"]]


def test_odd_tags_repeated_pairs_and_posts_without_tags_are_kept_as_the_tool_kept_them(tmp_path, parameters):
    usable = [tag for tag, name, kind in TAGS if name is not None and kind != 9]
    relations = [(post, tag) for tag in usable for post in (2, 1, 2)] + [(4, 99), (4, 3), (99, 3)]
    path = write_database(tmp_path / "a.db", [{"id": post} for post in (1, 2, 3, 4)], TAGS, relations)
    check(path, [1, 2, 3, 4], parameters)
    assert captions.caption_posts(Database(path), [3], parameters)["caption"].to_pylist() == [
        ", |||recent, safe, normal quality"
    ]


def test_every_rating_year_and_threshold_falls_where_the_tool_put_it(tmp_path, parameters):
    edges = sorted(
        {value + step for row in parameters.quality_above.values() for value in row for step in (0, 1)} | {-1, 0, 10**6}
    )
    posts = [{"rating": rating, "fav_count": count} for rating in range(4) for count in edges]
    dates = [f"{year}-01-01T00:00:00.000-05:00" for year in range(2003, 2028)]
    dates += [
        None,
        "",
        "gestern",
        "2023-02-30T00:00:00.000-05:00",
        "2024-02-29T23:59:59Z",
        "2023-02-29T00:00:00",
        "0000-00-00T00:00:00",
        "2015",
    ]
    dates += [
        "2015-13-05",
        "13/02/2019",
        "Feb 3 2011 10:00",
        "15-03-02",
        "1999-12-31T23:59:59.999+14:00",
        "2010-12-31T23:59:59-12:00",
        "2015-06-31 00:00:00",
    ]
    posts += [{"created_at": date} for date in dates]
    posts = [{"id": place + 1, **post} for place, post in enumerate(posts)]
    path = write_database(tmp_path / "a.db", posts)
    check(path, [post["id"] for post in posts], parameters)


def test_posts_above_seven_million_have_no_quality_tag_and_need_no_rating(tmp_path, parameters):
    posts = [
        {"id": post, "rating": rating, "fav_count": count}
        for post, rating, count in [
            # fmt: skip
            (7_000_000, 0, 9),
            (7_000_001, 0, 9),
            (7_000_002, None, 9),
            (7_000_003, 2, None),
            (6_999_999, None, 9),
            (6_999_998, 1, None),
            (7_000_004, 9, 9),
            (7_000_005, 0, None),
        ]
    ]
    path = write_database(tmp_path / "a.db", posts)
    ids = np.array(sorted(post["id"] for post in posts))
    can = captions.captionable(Database(path), ids, parameters)
    assert ids[~can].tolist() == [6_999_998, 6_999_999, 7_000_004]
    check(path, ids[can].tolist(), parameters)
    with pytest.raises(UserError, match="No caption can be written for post 6999998, 6999999, 7000004"):
        captions.caption_posts(Database(path), ids, parameters)


def test_artists_are_left_out_by_a_part_of_their_name_and_others_are_not(tmp_path, parameters):
    tags = [
        (1, "banned_artist", ARTIST), (2, "some_artist", ARTIST), (3, "banned_thing", GENERAL),
        (4, "unbanned", CHARACTER),
    ]  # fmt: skip
    path = write_database(tmp_path / "a.db", [{"id": 1}], tags, [(1, tag) for tag, *_ in tags])
    dropping = parameters.model_copy(update={"dropped_artists": ["banned"]})
    counts = tag_counts.TagCounter()
    captions.write_captions(Database(path), [1], dropping, tmp_path / "captions.parquet", counts)
    (written,) = parquet.read(tmp_path / "captions.parquet")["caption"].to_pylist()
    assert written == "unbanned, some artist, |||banned thing, recent, safe, normal quality"
    assert list(counts.artists()) == ["some artist"]
    assert "banned artist" in captions.caption_posts(Database(path), [1], parameters)["caption"].to_pylist()[0]


PERCENTILES = [90, 75, 60, 45, 30, 10]


def from_database(parameters):
    return params.Caption.model_validate(
        parameters.model_dump()
        | {
            "years": {str(year): tag for year, tag in parameters.years.items()},
            "ratings": {str(rating): words for rating, words in parameters.ratings.items()},
            "quality_above": {"percentiles": PERCENTILES},
        }
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.integers(-4, 5) | st.none(), st.integers(-3, 60) | st.none() | st.just(7.9)), max_size=60
    )
)
def test_thresholds_from_the_database_are_numpys_percentiles_of_all_its_posts_of_a_rating(
    tmp_path_factory, parameters, rows
):
    posts = [{"id": place + 1, "rating": rating, "fav_count": count} for place, (rating, count) in enumerate(rows)]
    database = Database(write_database(tmp_path_factory.mktemp("favourites") / "a.db", posts))
    found = post_metadata.quality_thresholds(database, from_database(parameters))
    for rating in range(4):
        counts = [int(count) for each, count in rows if count is not None and each in (rating, rating - 4)]
        assert (rating in found) == bool(counts)
        if counts:
            theirs = np.percentile(np.array(counts), PERCENTILES)
            assert found[rating] == np.floor(np.round(theirs, 9)).astype(int).tolist()
            assert all(
                (count > ours) == (count > round(threshold, 9))
                for count in counts
                for ours, threshold in zip(found[rating], theirs, strict=True)
            )


def test_quality_tags_from_the_database_do_not_depend_on_what_is_selected(tmp_path, parameters):
    """A hundred posts with 0 … 99 favourites: the 90th percentile is 89.1, so ten posts are above it."""
    posts = [{"id": 1000 + count, "rating": 0, "fav_count": count} for count in range(100)]
    posts += [{"id": 2000 + count, "rating": 3, "fav_count": 10 * count} for count in range(100)]
    database = Database(write_database(tmp_path / "a.db", posts))
    parameters = from_database(parameters)
    ids = [post["id"] for post in posts]
    tags = [text.split(", ")[-1] for text in captions.caption_posts(database, ids, parameters)["caption"].to_pylist()]
    assert tags[:100] == tags[100:]
    assert [tags[:100].count(tag) for tag in parameters.quality] == [10, 15, 15, 15, 15, 20, 10]
    few = [1000, 1050, 1095, 2095]
    chosen = captions.caption_posts(database, few, parameters)["caption"].to_pylist()
    assert [text.split(", ")[-1] for text in chosen] == [tags[ids.index(each)] for each in few]
    counted = dataset_statistics.metadata_counts(database, np.array(few), parameters)
    assert counted["quality_above"] == {
        0: {"p90": 89, "p75": 74, "p60": 59, "p45": 44, "p30": 29, "p10": 9},
        3: {"p90": 891, "p75": 742, "p60": 594, "p45": 445, "p30": 297, "p10": 99},
    }


def test_a_tag_without_a_name_or_of_an_unknown_type_makes_a_caption_impossible(tmp_path, parameters):
    path = write_database(
        tmp_path / "a.db", [{"id": post} for post in (1, 2, 3, 4)], TAGS, [(1, 23), (2, 24), (3, 25), (4, 3)]
    )
    assert captions.captionable(Database(path), np.array([1, 2, 3, 4]), parameters).tolist() == [
        False,
        False,
        True,
        True,
    ]
    check(path, [3, 4], parameters)


def test_captions_do_not_depend_on_how_posts_are_cut_into_chunks(tmp_path, parameters, monkeypatch):
    rng = np.random.default_rng(5)
    ids = np.unique(rng.integers(1, 8_000_000, 300))
    usable = [tag for tag, name, kind in TAGS if name is not None and kind != 9]
    relations = [(int(rng.choice(ids)), int(rng.choice(usable))) for _ in range(3000)]
    posts = [
        {"id": int(post), "rating": int(rng.integers(0, 4)), "fav_count": int(rng.integers(0, 300))} for post in ids
    ]
    path = write_database(tmp_path / "a.db", posts, TAGS, relations, later=True)
    check(path, ids[::2].tolist(), parameters)
    whole = captions.caption_posts(Database(path), ids[::2], parameters)
    monkeypatch.setattr(post_tags, "BITS", 6)
    assert captions.caption_posts(Database(path), ids[::2], parameters).equals(whole)


odd_text = st.text(max_size=6) | st.sampled_from(
    [
        "a_b",
        "1girl",
        "x" * 70,
        "_",
        "a, b",
        "|||",
        " ",
        "\u3000",
        "bad",
        "video_game",
        "(medium)",
        "ß_İ_ǅ",
        "a\nb",
        "\x1c",
        "初_音",
    ]
)
odd_date = (
    st.none()
    | st.text(max_size=12)
    | st.from_regex(r"(19|20)\d\d-[01]\d-[0-3]\d[T ][0-2]\d:[0-6]\d:[0-6]\d\.\d{3}[+-][0-2]\d:[0-6]\d", fullmatch=True)
)
odd_number = st.none() | st.integers(-6, 6) | st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_tags_dates_ratings_and_orders_are_captions_are_the_tools(tmp_path_factory, parameters, data):
    names = data.draw(st.lists(odd_text, unique=True, max_size=12))
    tags = [
        (3 * place + 1, name, data.draw(st.integers(0, 4) | st.none() | st.integers(-6, 6)))
        for place, name in enumerate(names)
    ]
    ids = sorted(data.draw(st.sets(st.integers(1, 40) | st.integers(6_999_998, 7_000_003), min_size=1, max_size=12)))
    posts = [
        {
            "id": post,
            "created_at": data.draw(odd_date),
            "rating": data.draw(odd_number),
            "fav_count": data.draw(odd_number | st.integers(0, 300)),
        }
        for post in ids
    ]
    pairs = data.draw(
        st.lists(st.tuples(st.sampled_from([*ids, 41]), st.sampled_from([tag for tag, *_ in tags] + [99])), max_size=60)
    )
    path = write_database(tmp_path_factory.mktemp("odd") / "a.db", posts, tags, pairs, later=data.draw(st.booleans()))
    with sqlite3.connect(path) as connection:
        expected = {post: caption(connection, post, parameters) for post in ids}
    connection.close()
    can = captions.captionable(Database(path), np.array(ids), parameters)
    assert dict(zip(ids, can.tolist(), strict=True)) == {post: text is not None for post, text in expected.items()}
    written = captions.caption_posts(Database(path), np.array(ids)[can], parameters)
    assert list(zip(*(written[name].to_pylist() for name in ("keep", "general", "caption")), strict=True)) == [
        text for text in expected.values() if text
    ]


def test_the_file_holds_the_same_captions_as_the_table_whatever_the_number_of_threads(
    tmp_path, parameters, monkeypatch
):
    path = "data/danbooru2023.db"
    ids = Database(path).post_ids()
    ids = ids[captions.captionable(Database(path), ids, parameters)]
    monkeypatch.setattr(post_tags, "BITS", 8)
    monkeypatch.setattr(parquet, "ROW_GROUP", 1 << 9)
    monkeypatch.setattr(database, "SPAN", 100)
    files = []
    for threads in (1, 8):
        for module in (database, post_tags):
            monkeypatch.setattr(module, "ordered_map", partial(ordered_map, threads=threads))
        captions.write_captions(Database(path), ids, parameters, tmp_path / f"{threads}.parquet")
        files.append((tmp_path / f"{threads}.parquet").read_bytes())
    assert files[0] == files[1]
    read = parquet.read(tmp_path / "1.parquet")
    assert read.to_pydict() == captions.caption_posts(Database(path), ids, parameters).to_pydict()


def test_captions_of_the_whole_miniature_are_those_of_the_tool(parameters):
    path = "data/danbooru2023.db"
    ids = Database(path).post_ids()
    check(path, ids[captions.captionable(Database(path), ids, parameters)].tolist(), parameters)


def test_lists_count_images_and_are_never_the_same(tmp_path, parameters):
    relations = [(1, 12), (1, 12), (2, 12), (2, 20), (3, 20), (1, 10), (2, 10), (3, 10), (3, 17)]
    path = write_database(tmp_path / "a.db", [{"id": post} for post in (1, 2, 3, 4)], TAGS, [*relations, (4, 20)])
    counts = tag_counts.TagCounter()
    captions.write_captions(Database(path), [1, 2, 3], parameters, tmp_path / "captions.parquet", counts)
    tag_counts.write_tag_counts(counts.artists(), tmp_path / "artists.json")
    assert list(json.loads((tmp_path / "artists.json").read_text()).items()) == [
        ("other artist", 2),
        ("some artist", 2),
    ]
    assert list(counts.characters().items()) == [("rice shower (umamusume)", 3), ("初音ミク (例)", 1)]


def test_blank_means_to_arrow_what_it_means_to_python():
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    blank = pc.equal(pc.utf8_trim_whitespace(pa.array(every)), "").to_pylist()
    assert [text for text, each in zip(every, blank, strict=True) if each] == [
        text for text in every if not text.strip()
    ]
