"""A stretch of posts with their tags, as every way of reading the relation gives it."""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_wrap.arrays import Int32Array
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.source import Source


class RowsOutOfOrder(Exception):
    """Rows turned out not to be in the order of their posts; read them again, sorted."""


@dataclass(frozen=True)
class TagChunk:
    """The tags of a stretch of the wanted posts."""

    first: int
    """Index of the first post among the wanted ones."""

    stop: int
    """Index after the last; posts without any tag are within the stretch too."""

    posts: Int32Array
    """(rows,) index of each row's post, counted from `first`, ascending."""

    tags: Int32Array
    """(rows,) row of each tag in the TagTable, NO_TAG where it has none; in the database's own order within a post."""


def relation_columns(source: Source) -> tuple[str, str]:
    """SQL for the ids of post and tag in the relation; plain names in sqlite, whose indexes are of these."""
    if isinstance(source, Database):
        return "post_id", "tag_id"
    dialect = source.dialect("posttagrelation")
    return dialect.number("post_id"), dialect.number("tag_id")


def count_rows(source: Source) -> int:
    """How many rows the relation has; of rowids with gaps, how many there may be, which sqlite knows at once."""
    if not isinstance(source, Database) or not source.has_row_ids:
        return int(source.value("SELECT count(*) FROM posttagrelation"))
    # Two queries: sqlite finds one end of a table at once, but scans it for both.
    first, last = (source.value(f"SELECT {end}(rowid) FROM posttagrelation") for end in ("min", "max"))
    return 0 if first is None else int(last - first + 1)
