from datetime import datetime

import pyarrow as pa
from dateutil.parser import parser, parserinfo
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_delta.danbooru import created_at

TODAY = parserinfo()
TODAY._year, TODAY._century = 2024, 2000


def dateutil_year(text: str) -> int:
    try:
        return parser(TODAY).parse(text, default=datetime(2024, 2, 14)).year
    except Exception:
        return 0


usual = st.from_regex(
    r"(19|20)\d\d-[01]\d-[0-3]\d[T ][0-2]\d:[0-6]\d:[0-6]\d\.\d{3}[+-][0-2]\d:[0-6]\d", fullmatch=True
)
spoiled = st.tuples(usual, st.integers(0, 28), st.characters()).map(
    lambda each: each[0][: each[1]] + each[2] + each[0][each[1] + 1 :]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(usual | spoiled | st.text(max_size=14) | st.dates().map(str), max_size=8))
def test_years_read_in_bulk_are_those_that_dateutil_reads(texts):
    array = pa.array(texts, pa.string()).cast(pa.binary())
    assert created_at.years(array).tolist() == [dateutil_year(text) for text in texts]
    assert created_at.years(array.slice(len(texts) // 2)).tolist() == [
        dateutil_year(text) for text in texts[len(texts) // 2 :]
    ]


def test_the_year_is_the_written_one_whatever_the_offset_and_todays_date():
    texts = [
        "2010-12-31T23:59:59.999-12:00",
        "2011-01-01T00:00:00.000+14:00",
        "2024-02-29T00:00:00.000-05:00",
        "2023-02-29T00:00:00.000-05:00",
        "12:30",
        "Feb 3",
        "",
    ]
    assert created_at.years(pa.array(texts).cast(pa.binary())).tolist() == [2010, 2011, 2024, 0, 2024, 2024, 0]
    assert created_at.years(pa.array([b"\xff\xfe", b"2016-\xff"], pa.binary())).tolist() == [0, 0]
