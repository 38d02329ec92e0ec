"""Upload years out of dates as the database writes them."""

from __future__ import annotations

import datetime
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int16Array

UNKNOWN_YEAR = 0

ORDINARY = (
    r"^[1-9]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"
    r"T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?([+-](0\d|1[0-2]):[0-5]\d|Z)?$"
)
"""Dates that every parser reads alike; all others are looked at one by one."""


def read_years(dates: pa.Array, parser: str = "iso") -> Int16Array:
    """(posts,) the local year of each date, UNKNOWN_YEAR where it cannot be read.

    `parser`: "iso" reads what begins with a valid YYYY-MM-DD; "dateutil" whatever python-dateutil reads, as
    HakuBooru does.
    """
    years = np.zeros(len(dates), dtype=np.int16)
    dates = dates.cast(pa.string()).fill_null("")
    ordinary = pc.match_substring_regex(dates, ORDINARY).to_numpy(zero_copy_only=False)
    if ordinary.any():
        digits = pc.utf8_slice_codeunits(dates.filter(pa.array(ordinary)), 0, 4)
        years[ordinary] = digits.cast(pa.int16()).to_numpy()
    read = read_iso_year if parser == "iso" else read_dateutil_year
    known: dict[str, int] = {}
    for place in np.flatnonzero(~ordinary).tolist():
        text = dates[place].as_py()
        if text not in known:
            known[text] = read(text)
        years[place] = known[text]
    return years


def read_iso_year(text: str) -> int:
    """The year of a text that begins with YYYY-MM-DD, UNKNOWN_YEAR for any other."""
    with suppress(ValueError):
        return datetime.date.fromisoformat(text[:10]).year if len(text) >= 10 and text[4:5] == "-" else UNKNOWN_YEAR
    return UNKNOWN_YEAR


def read_dateutil_year(text: str) -> int:
    """The year that python-dateutil finds, UNKNOWN_YEAR where it finds none."""
    with suppress(ValueError):
        return datetime.datetime.fromisoformat(text).year
    import dateutil.parser

    with suppress(ValueError, OverflowError, TypeError):
        return int(dateutil.parser.parse(text).year)
    return UNKNOWN_YEAR
