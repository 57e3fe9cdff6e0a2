"""Invariant: the year of created_at as the release's tool read it: the year that is written, in the offset that it
carries; 0 if unreadable.

The tool asked dateutil, which reads almost anything. The form that danbooru writes is read here in bulk; what has
another form is given to dateutil itself, each distinct text once. dateutil fills what a text does not say from today's
date and windows two-digit years around today: here today is the day of the release's selection script, so that a
rebuild next year reads the same.
"""

import warnings
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from dateutil.parser import parser, parserinfo

TODAY = datetime(2024, 2, 14)
USUAL = "2023-12-31T23:30:00.000-05:00"
NUMERIC = [0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 24, 25, 27, 28]  # of USUAL, two by two
FIXED = [4, 7, 10, 13, 16, 19, 26]
MARKS = np.frombuffer(b"--T::.:", np.uint8)
LEAST, MOST = np.array([19, 0, 1, 1, 0, 0, 0, 0, 0], np.uint8), np.array([20, 99, 12, 31, 23, 59, 59, 23, 59], np.uint8)
DAYS = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])


class FixedTodayParserInfo(parserinfo):
    def __init__(self):
        super().__init__()
        self._year, self._century = TODAY.year, TODAY.year // 100 * 100


DATEUTIL = parser(FixedTodayParserInfo())


def year(text: str) -> int:
    """The year that dateutil reads in a text, 0 when it reads none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DATEUTIL.parse(text, default=TODAY).year
    except Exception:  # the release's tool caught everything that dateutil raises
        return 0


def years(texts: pa.Array) -> np.ndarray:
    """The years, int16, of created_at texts (pa.binary, so that bytes that are no UTF-8 are merely unreadable)."""
    read = np.zeros(len(texts), np.int16)
    usual = np.flatnonzero(pc.equal(pc.binary_length(texts), len(USUAL)).to_numpy(zero_copy_only=False))
    if len(usual) == len(texts):
        plain = _parse_usual_forms(texts, read, usual)
    else:
        plain = _parse_usual_forms(texts.take(pa.array(usual)), read, usual)
    if len(plain) < len(texts):
        odd = np.ones(len(texts), bool)
        odd[plain] = False
        distinct = texts.filter(pa.array(odd)).dictionary_encode()
        values = [year(text.decode("utf-8", "replace")) for text in distinct.dictionary.to_pylist()]
        read[odd] = np.array(values, np.int16)[distinct.indices.to_numpy()]
    return read


def _parse_usual_forms(texts: pa.Array, read: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Writes the years of `texts`, all as long as USUAL, into `read` at `rows`; gives the rows that have its form and
    numbers in range.
    """
    if not len(texts):
        return rows
    width, start = len(USUAL), texts.buffers()[1]
    first = int(np.frombuffer(start, np.int32, 1, 4 * texts.offset)[0])
    letters = np.frombuffer(texts.buffers()[2], np.uint8, len(texts) * width, first).reshape(-1, width)
    digits = letters[:, NUMERIC] - ord("0")  # what is no digit wraps to 10 and more
    number = (
        digits[:, 0::2] * 10 + digits[:, 1::2]
    )  # century, year, month, day, hour, minute, second, offset's hour and minute
    good = (
        (digits <= 9).all(axis=1)
        & (letters[:, FIXED] == MARKS).all(axis=1)
        & ((letters[:, 23] == ord("-")) | (letters[:, 23] == ord("+")))
    )
    good &= ((letters[:, 20:23] - ord("0")) <= 9).all(axis=1) & ((number >= LEAST) & (number <= MOST)).all(axis=1)
    written = number[:, 0].astype(np.int16) * 100 + number[:, 1]
    leap = (written % 4 == 0) & ((written % 100 != 0) | (written % 400 == 0))
    exists = number[:, 3] <= DAYS[np.minimum(number[:, 2], 12)] + (leap & (number[:, 2] == 2))
    read[rows] = np.where(exists, written, 0)
    return rows[good]
