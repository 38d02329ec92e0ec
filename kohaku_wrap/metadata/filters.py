"""What a post can be dropped for, as SQL that is true for a post to drop."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STILL_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif")
"""What the trainer reads, of what the site holds; gif, mp4, webm, zip and swf are no still images."""

RATINGS = ("general", "sensitive", "questionable", "explicit")
"""Names of `post.rating` 0 … 3."""


YES_WORDS = ("t", "true", "y", "yes", "on")
NO_WORDS = ("f", "false", "n", "no", "off")
"""What dumps of Postgres, CSV and Python write for a flag, in any case; all other words are unknown."""

NULL_WORDS = ("", "NULL", "null", "None", "none", "NaN", "nan", "\\N")
"""What dumps write where there is no text."""


def quote(text: str) -> str:
    """`text` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _trimmed(column: str) -> str:
    return f"trim({column}, ' ' || char(9, 10, 13))"


def number_sql(column: str) -> str:
    """SQL for the whole number that `column` holds, NULL where it holds none: '', words, fractions, blobs.

    '5' and '5.0' are numbers as CSV files have them; nothing is guessed from the beginning of a text.
    """
    text, number = _trimmed(column), f"CAST(CAST({_trimmed(column)} AS INTEGER) AS TEXT)"
    return (
        f"CASE typeof({column}) WHEN 'integer' THEN {column} "
        f"WHEN 'real' THEN CASE WHEN {column} = CAST({column} AS INTEGER) THEN CAST({column} AS INTEGER) END "
        f"WHEN 'text' THEN CASE WHEN {text} IN ({number}, {number} || '.0') THEN CAST({text} AS INTEGER) END END"
    )


def size_sql(column: str) -> str:
    """SQL for a width or height in pixels, NULL where it is unknown, as 0 is."""
    return f"nullif(max({number_sql(column)}, 0), 0)"


def flag_sql(column: str) -> str:
    """SQL for a flag: 1, 0, or NULL where it is unknown."""
    word = f"lower({_trimmed(column)})"
    return (
        f"CASE WHEN typeof({column}) IN ('integer', 'real') THEN {column} <> 0 "
        f"WHEN typeof({column}) <> 'text' THEN NULL "
        f"WHEN {word} IN ({', '.join(map(quote, YES_WORDS))}) THEN 1 "
        f"WHEN {word} IN ({', '.join(map(quote, NO_WORDS))}) THEN 0 "
        f"ELSE ({number_sql(column)}) <> 0 END"
    )


def _is_lacking(column: str) -> str:
    """SQL that is true where a text is NULL or one of NULL_WORDS."""
    return f"coalesce({column}, '') IN ({', '.join(map(quote, NULL_WORDS))})"


RATING_SQL = f"CASE WHEN ({number_sql('rating')}) IN (0, 1, 2, 3) THEN ({number_sql('rating')}) ELSE -1 END"
EXTENSION_SQL = "lower(coalesce(file_ext, ''))"
DAY_SQL = "substr(created_at, 1, 10)"
READABLE_DATE_SQL = f"coalesce(date({DAY_SQL}, '+0 days') = {DAY_SQL}, 0)"
"""sqlite gives NULL for what is no date, and another day for the 31st of June once days are added."""

FLAG_COLUMNS = {"deleted": "is_deleted", "banned": "is_banned"}
"""Filters that ask one column of yes and no; a post whose flag is unknown is kept."""

FLAGS: Mapping[str, str] = {
    "deleted": f"coalesce({flag_sql('is_deleted')}, 0)",
    "gold": f"{_is_lacking('md5')} OR {_is_lacking('file_url')}",
    "banned": f"coalesce({flag_sql('is_banned')}, 0)",
    "no_still_image": f"{EXTENSION_SQL} NOT IN ({', '.join(map(quote, STILL_EXTENSIONS))})",
}
"""Filters that need no value. Gold: posts that only a gold account sees, without md5 or file url in the metadata."""


@dataclass(frozen=True)
class Filter:
    """One reason to drop a post."""

    name: str
    """The reason, as reports give it."""

    drops: str
    """SQL over `post`, true for a post to drop and never NULL."""

    unknown: str = "0"
    """SQL over `post`, true where the database does not say what is asked; never NULL."""


def flag_filter(name: str) -> Filter:
    """A filter of FLAGS by its name."""
    if name == "no_still_image":
        return Filter(name, FLAGS[name], f"{EXTENSION_SQL} = ''")
    column = FLAG_COLUMNS.get(name)
    return Filter(name, FLAGS[name], f"({flag_sql(column)}) IS NULL" if column else "0")


def range_filter(name: str, value: str, smallest: int | None, largest: int | None) -> Filter:
    """Drop posts whose `value` (SQL, NULL for unknown) lies outside smallest … largest (inclusive) or is unknown."""
    outside = [f"({value}) < {smallest}"] if smallest is not None else []
    outside += [f"({value}) > {largest}"] if largest is not None else []
    return Filter(name, f"coalesce({' OR '.join(outside)}, 1)", f"({value}) IS NULL")


def date_filter(name: str, first: datetime.date | None, last: datetime.date | None) -> Filter:
    """Drop posts uploaded outside first … last (inclusive, the local date as written) or without a readable date."""
    outside = [f"NOT ({READABLE_DATE_SQL})"]
    outside += [f"{DAY_SQL} < {quote(first.isoformat())}"] if first else []
    outside += [f"{DAY_SQL} > {quote(last.isoformat())}"] if last else []
    return Filter(name, " OR ".join(outside), f"NOT ({READABLE_DATE_SQL})")


def rating_filter(name: str, ratings: Sequence[str]) -> Filter:
    """Drop posts of other ratings than these, and those of an unknown one."""
    wanted = ", ".join(str(RATINGS.index(rating)) for rating in ratings)
    return Filter(name, f"{RATING_SQL} NOT IN ({wanted})", f"{RATING_SQL} = -1")


def extension_filter(name: str, extensions: Sequence[str]) -> Filter:
    """Drop posts whose file has another extension than these."""
    wanted = ", ".join(quote(extension.lower().lstrip(".")) for extension in extensions)
    return Filter(name, f"{EXTENSION_SQL} NOT IN ({wanted})", f"{EXTENSION_SQL} = ''")
