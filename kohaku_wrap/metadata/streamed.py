"""The tags of posts out of relations that are read once from their beginning to their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.metadata.chunks import RowsOutOfOrder, TagChunk, count_rows, relation_columns
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.places import place_finder
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.spill import Rows
from kohaku_wrap.metadata.tags import TagTable

ROWS_A_BATCH = 1 << 18
"""Rows of a relation read at once."""


def streamed_pieces(source: Source, tags: TagTable, post_ids: Int64Array) -> Iterator[Callable[[], TagChunk]]:
    """Chunks in the order of a table whose rows ascend by post. Raises RowsOutOfOrder where they do not."""
    first = 0
    for places, tag_rows in _relation_rows(source, tags, post_ids):
        if not len(places):
            continue
        stop = int(places[-1]) + 1
        yield partial(TagChunk, first, stop, places - np.int32(first), tag_rows)
        first = stop
    if first < len(post_ids):
        nothing = np.empty(0, dtype=np.int32)
        yield partial(TagChunk, first, len(post_ids), nothing, nothing)


def unordered_rows(source: Source, tags: TagTable, post_ids: Int64Array) -> tuple[int, Iterator[Callable[[], Rows]]]:
    """About how many rows there are, and all of them in the order of the table."""
    place_of = place_finder(post_ids)
    return count_rows(source), (partial(_find_wanted, place_of, tags, *some) for some in _scan_relation(source))


def _relation_rows(source: Source, tags: TagTable, post_ids: Int64Array) -> Iterator[Rows]:
    """The rows of whole posts: those of a batch's last post are kept for the next one."""
    place_of = place_finder(post_ids)
    kept: tuple[Int64Array, ...] = (np.empty(0, np.int64),) * 2
    for some in _scan_relation(source):
        posts, tag_ids = (np.concatenate(pair) for pair in zip(kept, some, strict=True))
        if (posts[1:] < posts[:-1]).any():
            raise RowsOutOfOrder
        cut = int(np.searchsorted(posts, posts[-1])) if len(posts) else 0
        kept = posts[cut:], tag_ids[cut:]
        yield _find_wanted(place_of, tags, posts[:cut], tag_ids[:cut])
    yield _find_wanted(place_of, tags, *kept)


def _find_wanted(
    place_of: Callable[[Int64Array], Int32Array], tags: TagTable, posts: Int64Array, tag_ids: Int64Array
) -> Rows:
    """The rows of wanted posts."""
    places = place_of(posts)
    wanted = np.flatnonzero(places >= 0)
    return places[wanted], tags.rows_of(tag_ids[wanted])


def _scan_relation(source: Source) -> Iterator[tuple[Int64Array, ...]]:
    """Post and tag ids of every row of the relation in the order of the table."""
    post, tag = relation_columns(source)
    order = " ORDER BY rowid" if isinstance(source, Database) and source.has_row_ids else ""
    return source.scan_numbers(
        f"SELECT {post} AS post_id, {tag} AS tag_id FROM posttagrelation "
        f"WHERE post_id IS NOT NULL AND tag_id IS NOT NULL{order}",
        ROWS_A_BATCH,
    )
