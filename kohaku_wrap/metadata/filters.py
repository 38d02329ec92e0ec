"""What a post can be dropped for, as SQL over the columns that every edition is read as."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLUMNS = (
    *("id", "created_at", "day", "md5", "file_url", "file_ext", "rating", "score", "fav_count"),
    *("image_width", "image_height", "is_deleted", "is_banned", "parent_id"),
)
"""What every edition is read as, one row a post. `created_at` is text, '' without one; `day` its YYYY-MM-DD, NULL where
it is no date; `rating` 0 … 3 or -1; `md5`, `file_url` text, NULL where the edition has no such column; `file_ext` small
letters; flags 1, 0 or NULL; sizes above 0 or NULL; `parent_id` 0 or NULL
without a parent."""

STILL_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif")
"""What the trainer reads, of what the site holds; gif, mp4, webm, zip and swf are no still images."""

RATINGS = ("general", "sensitive", "questionable", "explicit")
"""Names of `post.rating` 0 … 3."""


YES_WORDS = ("t", "true", "y", "yes", "on", "deleted")
NO_WORDS = ("f", "false", "n", "no", "off", "active")
"""What dumps of Postgres, CSV and Python write for a flag, in any case; all other words are unknown."""

NULL_WORDS = ("", "NULL", "null", "None", "none", "NaN", "nan", "\\N")
"""What dumps write where there is no text."""


def quote(text: str) -> str:
    """`text` as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _is_lacking(column: str) -> str:
    """SQL that is true where a text is one of NULL_WORDS; a column that is not there lacks nothing."""
    return f"coalesce({column} IN ({', '.join(map(quote, NULL_WORDS))}), FALSE)"


FLAG_COLUMNS = {"deleted": "is_deleted", "banned": "is_banned"}
"""Filters that ask one column of yes and no; a post whose flag is unknown is kept."""

FLAGS: Mapping[str, str] = {
    "deleted": "coalesce(is_deleted, 0) <> 0",
    "gold": f"({_is_lacking('md5')} OR {_is_lacking('file_url')})",
    "banned": "coalesce(is_banned, 0) <> 0",
    "no_still_image": f"file_ext NOT IN ({', '.join(map(quote, STILL_EXTENSIONS))})",
}
"""Filters that need no value. Gold: posts that only a gold account sees, without md5 or file url in the metadata."""

NO_OFFSET = (
    "(day IS NOT NULL AND length(created_at) >= 19 AND substr(created_at, -1, 1) <> 'Z' "
    + " ".join(f"AND substr(created_at, -{length}, 1) NOT IN ('+', '-')" for length in (3, 5, 6))
    + ")"
)
"""SQL that is true for a post whose date says no zone: -04, -0400 and -04:00 are some."""


@dataclass(frozen=True)
class Filter:
    """One reason to drop a post."""

    name: str
    """The reason, as reports give it."""

    drops: str
    """SQL over the columns of COLUMNS, true for a post to drop and never NULL."""

    unknown: str = "FALSE"
    """Likewise, true where the database does not say what is asked; never NULL."""


def flag_filter(name: str) -> Filter:
    """A filter of FLAGS by its name."""
    if name == "no_still_image":
        return Filter(name, FLAGS[name], "file_ext = ''")
    column = FLAG_COLUMNS.get(name)
    return Filter(name, FLAGS[name], f"{column} IS NULL" if column else "(md5 IS NULL AND file_url IS NULL)")


def range_filter(name: str, value: str, smallest: int | None, largest: int | None) -> Filter:
    """Drop posts whose `value` (SQL, NULL for unknown) lies outside smallest … largest (inclusive) or is unknown."""
    outside = [f"({value}) < {smallest}"] if smallest is not None else []
    outside += [f"({value}) > {largest}"] if largest is not None else []
    return Filter(name, f"coalesce({' OR '.join(outside)}, TRUE)", f"({value}) IS NULL")


def date_filter(name: str, first: datetime.date | None, last: datetime.date | None) -> Filter:
    """Drop posts uploaded outside first … last (inclusive, the local date as written) or without a readable date."""
    outside = [f"day < {quote(first.isoformat())}"] if first else []
    outside += [f"day > {quote(last.isoformat())}"] if last else []
    return Filter(name, f"coalesce({' OR '.join(outside) or 'FALSE'}, TRUE)", "day IS NULL")


def rating_filter(name: str, ratings: Sequence[str]) -> Filter:
    """Drop posts of other ratings than these, and those of an unknown one."""
    wanted = ", ".join(str(RATINGS.index(rating)) for rating in ratings)
    return Filter(name, f"rating NOT IN ({wanted})", "rating = -1")


def extension_filter(name: str, extensions: Sequence[str]) -> Filter:
    """Drop posts whose file has another extension than these."""
    wanted = ", ".join(quote(extension.lower().lstrip(".")) for extension in extensions)
    return Filter(name, f"file_ext NOT IN ({wanted})", "file_ext = ''")
