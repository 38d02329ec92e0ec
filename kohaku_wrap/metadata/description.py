"""What a metadata database is: its layout, its counts and ranges, and what each filter would drop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.metadata.columns import DANBOORU, TAG_TYPES, SiteMapping
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.editions import find_lacks
from kohaku_wrap.metadata.filters import FLAG_COLUMNS, FLAGS, NO_OFFSET, RATINGS
from kohaku_wrap.metadata.opening import open_metadata
from kohaku_wrap.metadata.places import FirstRows
from kohaku_wrap.metadata.posts import bits_sql, post_ids
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.table_files import DUMP_TABLES
from kohaku_wrap.metadata.tags import read_tags


@dataclass(frozen=True)
class DatabaseDescription:
    """What `kwrap inspect DB` tells."""

    path: Path
    """The database file."""

    edition: str
    """What was recognised."""

    columns: Mapping[str, str]
    """By what is read, the column of the table; empty for danbooru2023, whose columns have fixed names."""

    lacks: Mapping[str, str]
    """What the edition does not say, and what follows."""

    layout: str
    """v0, v1, v2 or v3 of danbooru2023, or api."""

    token_base: int | None
    """Base of the tag ids in layout v0's lists; None in the other layouts."""

    size_bytes: int
    """Of the file."""

    posts: int
    """Different posts."""

    duplicate_ids: int
    """Rows of posts beyond the first of their id, which do not count."""

    tags: int
    """Different tags."""

    relations: int | None
    """Rows of `posttagrelation`; None where there is no such table."""

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

    no_offset: int
    """Posts whose date says no offset; it is read in the zone of the site."""

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


UNKNOWN_COLUMNS = (*FLAG_COLUMNS.values(), "fav_count", "score", "image_width", "image_height")
"""Columns whose unknown values are counted beside those of dates and ratings."""


def describe_database(path: Path, mapping: SiteMapping = DANBOORU) -> DatabaseDescription:
    """Describe the metadata set at `path`; raises what `open_metadata` raises."""
    source = open_metadata(path, mapping)
    counts, scanned = _scan_posts(source)
    tags = read_tags(source)
    database = source if isinstance(source, Database) else None
    relations = None
    if source.edition.layout in ("v1", "v2", "v3"):
        relations = int(source.value("SELECT count(*) FROM posttagrelation"))
    others = () if database is None or source.edition.has_tag_strings else database.columns
    types = np.bincount(tags.types + 1, minlength=len(TAG_TYPES) + 1).tolist()
    return DatabaseDescription(
        path=path,
        edition=source.edition.name,
        columns=source.edition.columns,
        lacks=find_lacks(source.edition, counts["deleted"], counts["no_offset"]),
        layout=source.edition.layout,
        token_base=(database.token_base if database else 0) or None,
        size_bytes=sum(file.stat().st_size for file in source.files),
        tags=len(tags),
        relations=relations,
        indexes=tuple(sorted(database.indexed)) if database else (),
        unknown_dates=counts["unknown_date"],
        no_offset=counts["no_offset"],
        would_drop={name: counts[name] for name in FLAGS},
        unknown={column: counts[f"unknown {column}"] for column in UNKNOWN_COLUMNS},
        ratings={name: counts[f"rating {name}"] for name in (*RATINGS, "unknown")},
        tag_types=dict(zip((*TAG_TYPES, "unknown"), [*types[1:], types[0]], strict=True)),
        unknown_tables=tuple(sorted(name for name in others if name not in DUMP_TABLES and name[:7] != "sqlite_")),
        **scanned,
    )


CONDITIONS: Mapping[str, str] = {
    **FLAGS,
    "unknown_date": "day IS NULL",
    "no_offset": NO_OFFSET,
    **{f"unknown {column}": f"{column} IS NULL" for column in UNKNOWN_COLUMNS},
    **{f"rating {name}": f"rating = {number}" for number, name in ((-1, "unknown"), *enumerate(RATINGS))},
}
"""What is counted, and the SQL that is true for it."""


def _scan_posts(source: Source) -> tuple[Counter[str], dict[str, Any]]:
    """Count posts by CONDITIONS, each post once, in one pass; with what a description says of all of them."""
    counts, extensions = Counter[str](), Counter[str]()
    rows = posts = 0
    first_rows = None if source.edition.unique_ids else FirstRows()
    days: set[str] = set()
    ids_seen: list[int] = []
    query = f"SELECT id, {bits_sql(tuple(CONDITIONS.values()))} AS bits, coalesce(day, '') AS day, file_ext"
    for batch in source.scan(f"{query} FROM ({source.edition.posts}) AS post"):
        rows += batch.num_rows
        ids = post_ids(source, batch.column(0))
        if first_rows and not (kept := first_rows.keep(ids)).all():
            batch, ids = batch.filter(pa.array(kept)), ids[kept]
        if not len(ids):
            continue
        posts += len(ids)
        bits = batch.column(1).to_numpy()
        for place, name in enumerate(CONDITIONS):
            counts[name] += int((bits >> place & 1).sum())
        ids_seen += [int(ids.min()), int(ids.max())]
        days |= set(pc.min_max(batch.column(2).filter(pc.not_equal(batch.column(2), ""))).as_py().values())
        for one in pc.value_counts(batch.column(3)).to_pylist():
            extensions[one["values"] or "none"] += one["counts"]
    known = [day for day in days if day]
    return counts, {
        "posts": posts,
        "duplicate_ids": rows - posts,
        "first_id": min(ids_seen, default=None),
        "last_id": max(ids_seen, default=None),
        "first_date": min(known, default=None),
        "last_date": max(known, default=None),
        "extensions": dict(sorted(extensions.items(), key=lambda item: (-item[1], item[0]))),
    }
