"""The year of created_at as the release's tool read it: the year as written, in the time zone as written; 0 if
unreadable.

The tool used dateutil, which accepts almost any text, and so does this module. dateutil takes what a text leaves out
from today's date and places two-digit years around today. Here "today" is the day of the release's selection script, so
a rebuild next year reads the same years.
"""

import warnings
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from dateutil.parser import parser, parserinfo

TODAY = datetime(2024, 2, 14)
USUAL = "2023-12-31T23:30:00.000-05:00"  # the form that Danbooru writes
DATE = len("2023-12-31")
USUAL_FORM = (
    r"^(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
    r"T([01]\d|2[0-3])(:[0-5]\d){2}\.\d{3}[+-]([01]\d|2[0-3]):[0-5]\d$"
)


class FixedTodayParserInfo(parserinfo):
    def __init__(self) -> None:
        super().__init__()
        self._year, self._century = TODAY.year, TODAY.year // 100 * 100


DATEUTIL = parser(FixedTodayParserInfo())


def year(text: str) -> int:
    """The year that dateutil reads in a text, 0 if it reads none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DATEUTIL.parse(text, default=TODAY).year
    except Exception:  # the release's tool caught everything that dateutil raises
        return 0


def years(texts: pa.Array) -> np.ndarray:
    """The years (int16) of created_at texts. `texts` is pa.binary, so that bytes that are not UTF-8 are merely
    unreadable.

    A valid time of day and offset cannot change the year, so they are cut off the usual form, and dateutil reads each
    distinct date once.
    """
    usual = pc.match_substring_regex(texts, USUAL_FORM)
    distinct = pc.if_else(usual, pc.binary_slice(texts, 0, DATE), texts).dictionary_encode()
    values = [year(text.decode("utf-8", "replace")) for text in distinct.dictionary.to_pylist()]
    return np.array(values, np.int16)[distinct.indices.to_numpy()]
