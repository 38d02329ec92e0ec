"""What a post can be dropped for, as SQL that is true for a post to drop."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STILL_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif")
RATINGS = ("general", "sensitive", "questionable", "explicit")
"""Names of `post.rating` 0 … 3."""


def quote(text: str) -> str:
    """`text` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


RATING_SQL = "CASE WHEN rating IN (0, 1, 2, 3) THEN CAST(rating AS INTEGER) ELSE -1 END"
EXTENSION_SQL = "lower(coalesce(file_ext, ''))"
DAY_SQL = "substr(created_at, 1, 10)"
READABLE_DATE_SQL = f"coalesce(date({DAY_SQL}, '+0 days') = {DAY_SQL}, 0)"
"""sqlite gives NULL for what is no date, and another day for the 31st of June once days are added."""

FLAGS: Mapping[str, str] = {
    "deleted": "coalesce(is_deleted, 0) <> 0",
    "gold": "coalesce(md5, '') = '' OR coalesce(file_url, '') = ''",
    "banned": "coalesce(is_banned, 0) <> 0",
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


def flag_filter(name: str) -> Filter:
    """A filter of FLAGS by its name."""
    return Filter(name, FLAGS[name])


def range_filter(name: str, column: str, smallest: int | None, largest: int | None) -> Filter:
    """Drop posts whose `column` lies outside smallest … largest (inclusive) or is unknown."""
    outside = [f"{column} < {smallest}"] if smallest is not None else []
    outside += [f"{column} > {largest}"] if largest is not None else []
    return Filter(name, f"coalesce({' OR '.join(outside)}, 1)")


def date_filter(name: str, first: datetime.date | None, last: datetime.date | None) -> Filter:
    """Drop posts uploaded outside first … last (inclusive, the local date as written) or without a readable date."""
    outside = [f"NOT ({READABLE_DATE_SQL})"]
    outside += [f"{DAY_SQL} < {quote(first.isoformat())}"] if first else []
    outside += [f"{DAY_SQL} > {quote(last.isoformat())}"] if last else []
    return Filter(name, " OR ".join(outside))


def rating_filter(name: str, ratings: Sequence[str]) -> Filter:
    """Drop posts of other ratings than these, and those of an unknown one."""
    wanted = ", ".join(str(RATINGS.index(rating)) for rating in ratings)
    return Filter(name, f"{RATING_SQL} NOT IN ({wanted})")


def extension_filter(name: str, extensions: Sequence[str]) -> Filter:
    """Drop posts whose file has another extension than these."""
    wanted = ", ".join(quote(extension.lower().lstrip(".")) for extension in extensions)
    return Filter(name, f"{EXTENSION_SQL} NOT IN ({wanted})")
