"""What a metadata database is: its layout, its counts and ranges, and what each filter would drop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.filters import (
    DAY_SQL,
    EXTENSION_SQL,
    FLAG_COLUMNS,
    FLAGS,
    RATING_SQL,
    RATINGS,
    READABLE_DATE_SQL,
    flag_sql,
    number_sql,
    size_sql,
)
from kohaku_wrap.metadata.tags import TAG_TYPES


@dataclass(frozen=True)
class DatabaseDescription:
    """What `kwrap inspect DB` tells."""

    path: Path
    """The database file."""

    layout: str
    """v0, v1, v2 or v3."""

    token_base: int | None
    """Base of the tag ids in layout v0's lists; None in the other layouts."""

    size_bytes: int
    """Of the file."""

    posts: int
    """Rows of `post`."""

    tags: int
    """Rows of `tag`."""

    relations: int | None
    """Rows of `posttagrelation`; None in layout v0."""

    indexes: tuple[str, ...]
    """`table.column` of the columns that lead an index."""

    first_id: int | None
    """Smallest post id."""

    last_id: int | None
    """Largest post id."""

    first_date: str | None
    """Earliest readable upload date, YYYY-MM-DD as written."""

    last_date: str | None
    """Latest readable upload date."""

    unknown_dates: int
    """Posts whose upload date cannot be read."""

    would_drop: Mapping[str, int]
    """For each filter, the posts that it alone would drop."""

    unknown: Mapping[str, int]
    """By column, posts for which it holds what is no number or no flag; a post with an unknown flag is kept."""

    ratings: Mapping[str, int]
    """Posts by rating, `unknown` last."""

    extensions: Mapping[str, int]
    """Posts by file extension, most frequent first."""

    tag_types: Mapping[str, int]
    """Tags by type, `unknown` last."""

    unknown_tables: tuple[str, ...]
    """Tables that kwrap does not know and ignores."""


UNKNOWN_SQL = {
    **{column: f"({flag_sql(column)}) IS NULL" for column in FLAG_COLUMNS.values()},
    **{column: f"({number_sql(column)}) IS NULL" for column in ("fav_count", "score")},
    **{column: f"({size_sql(column)}) IS NULL" for column in ("image_width", "image_height")},
}
"""Columns whose unknown values are counted beside those of dates and ratings, and the SQL that finds them."""

KNOWN_TABLES = frozenset({"post", "tag", "posttagrelation", "localpost"})


def describe_database(path: Path) -> DatabaseDescription:
    """Describe the database at `path`; raises what `open_database` raises."""
    database = open_database(path)
    sums = ", ".join(f"coalesce(sum({drops}), 0)" for drops in (*FLAGS.values(), *UNKNOWN_SQL.values()))
    with database.connect() as connection:
        posts, first_id, last_id, known, first_date, last_date, *counted = connection.execute(
            f"SELECT count(*), min(id), max(id), coalesce(sum({READABLE_DATE_SQL}), 0), "
            f"min(CASE WHEN {READABLE_DATE_SQL} THEN {DAY_SQL} END), "
            f"max(CASE WHEN {READABLE_DATE_SQL} THEN {DAY_SQL} END), {sums} FROM post"
        ).fetchone()
        grouped = connection.execute(
            f"SELECT {RATING_SQL} AS r, {EXTENSION_SQL} AS e, count(*) FROM post GROUP BY r, e"
        ).fetchall()
        kind = number_sql("type")
        types = dict(connection.execute(f"SELECT {kind} AS k, count(*) FROM tag GROUP BY k").fetchall())
        relations = None
        if database.layout.has_relation:
            relations = connection.execute("SELECT count(*) FROM posttagrelation").fetchone()[0]
    ratings: dict[str, int] = dict.fromkeys((*RATINGS, "unknown"), 0)
    extensions: dict[str, int] = {}
    for rating, extension, count in grouped:
        ratings[RATINGS[rating] if rating >= 0 else "unknown"] += count
        extensions[extension or "none"] = extensions.get(extension or "none", 0) + count
    tag_types = {name: types.pop(number, 0) for number, name in enumerate(TAG_TYPES)}
    tag_types["unknown"] = sum(types.values())
    return DatabaseDescription(
        path=path,
        layout=database.layout.value,
        token_base=database.token_base or None,
        size_bytes=database.path.stat().st_size,
        posts=posts,
        tags=sum(tag_types.values()),
        relations=relations,
        indexes=tuple(sorted(database.indexed)),
        first_id=first_id,
        last_id=last_id,
        first_date=first_date,
        last_date=last_date,
        unknown_dates=posts - known,
        would_drop=dict(zip(FLAGS, counted, strict=False)),
        unknown=dict(zip(UNKNOWN_SQL, counted[len(FLAGS) :], strict=True)),
        ratings=ratings,
        extensions=dict(sorted(extensions.items(), key=lambda item: (-item[1], item[0]))),
        tag_types=tag_types,
        unknown_tables=tuple(
            sorted(name for name in database.columns if name not in KNOWN_TABLES and not name.startswith("sqlite_"))
        ),
    )
