"""The tags of posts, post after post, as arrays of bounded size, from any layout and in any row order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.metadata.chunks import TagChunk, count_rows
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.layouts import Layout
from kohaku_wrap.metadata.parallel import map_in_order, read_ahead
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.spill import sorted_pieces
from kohaku_wrap.metadata.streamed import streamed_pieces, unordered_rows
from kohaku_wrap.metadata.tags import TagTable, read_tags

Result = TypeVar("Result")

POSTS_A_CHUNK = 1 << 14
"""Posts read at once where tags are found by post: layout v0, and lookups through an index."""

ROWS_A_LOOKUP = 200
"""A post is looked up through an index when that reads fewer rows than a scan, at this many rows a lookup."""

IDS_A_QUERY = 500

NO_ROWS: tuple[Int64Array, ...] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
"""Post and tag ids of no rows."""


def map_tag_chunks(
    source: Source,
    tags: TagTable,
    post_ids: Int64Array,
    work: Callable[[TagChunk], Result],
    threads: int,
    spill_folder: Path | None,
) -> Iterator[Result]:
    """`work` of chunks that cover each of the posts `post_ids` (ascending) once, in order.

    The work is done in `threads` threads; memory does not grow with the database. A relation table in the order
    of its posts, as it is published, is read once. Any other is sorted through temporary files of 8 bytes a row
    in `spill_folder`: where that shows only on the way, RowsOutOfOrder is raised while `spill_folder` is None.
    """
    if not len(post_ids):
        return
    if source.edition.has_tag_strings:
        whole = tags if tags.pieces is not None else read_tags(source, post_ids, spill_folder)
        pieces: Iterable[Callable[[], TagChunk]] = whole.pieces or ()
    elif isinstance(source, Database) and source.layout is Layout.V0:
        pieces = _token_pieces(source, tags, post_ids)
    elif isinstance(source, Database) and source.layout.has_relation and _lookup_is_cheaper(source, len(post_ids)):
        pieces = _lookup_pieces(source, tags, post_ids)
    elif spill_folder is not None:
        rows, batches = unordered_rows(source, tags, post_ids)
        pieces = sorted_pieces(rows, batches, len(post_ids), spill_folder, threads)
    else:
        pieces = read_ahead(streamed_pieces(source, tags, post_ids))
    yield from map_in_order(lambda piece: work(piece()), pieces, threads)


def _lookup_is_cheaper(database: Database, posts: int) -> bool:
    """Whether asking for the posts reads less than a scan; one question without an index is a scan within sqlite."""
    if posts <= IDS_A_QUERY:
        return True
    if "posttagrelation.post_id" not in database.indexed:
        return False
    return posts * ROWS_A_LOOKUP < count_rows(database)


def _token_pieces(database: Database, tags: TagTable, post_ids: Int64Array) -> Iterator[Callable[[], TagChunk]]:
    """Layout v0: the tag lists of stretches of posts."""

    def read(first: int, stop: int) -> TagChunk:
        wanted = post_ids[first:stop]
        query = (
            "SELECT CAST(id AS INTEGER), CAST(coalesce(tag_list, '') AS TEXT) FROM post "
            f"WHERE id BETWEEN {wanted[0]} AND {wanted[-1]}{database.of_first_rows} ORDER BY id"
        )
        posts, found = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
        for batch in database.scan(query):
            ids = batch.column(0).to_numpy().astype(np.int64)
            listed = np.isin(ids, wanted)
            lists = batch.column(1).filter(pa.array(listed))
            ids = ids[listed]
            owners, tag_ids = parse_tag_lists(ids, lists, database.token_base)
            posts.append(np.searchsorted(wanted, ids).astype(np.int32)[owners])
            found.append(tag_ids)
        return TagChunk(first, stop, np.concatenate(posts), tags.rows_of(np.concatenate(found)))

    yield from _by_posts(len(post_ids), read)


def _lookup_pieces(database: Database, tags: TagTable, post_ids: Int64Array) -> Iterator[Callable[[], TagChunk]]:
    """A few posts of a large relation, through its index."""

    def read(first: int, stop: int) -> TagChunk:
        wanted = post_ids[first:stop]
        rows = [NO_ROWS]
        row_order = ", rowid" if database.has_row_ids else ""
        for start in range(0, len(wanted), IDS_A_QUERY):
            some = ", ".join(map(str, wanted[start : start + IDS_A_QUERY].tolist()))
            rows += database.scan_numbers(
                f"SELECT post_id, tag_id FROM posttagrelation WHERE post_id IN ({some}) "
                f"AND tag_id IS NOT NULL ORDER BY post_id{row_order}"
            )
        posts, tag_ids = map(np.concatenate, zip(*rows, strict=True))
        return TagChunk(first, stop, np.searchsorted(wanted, posts).astype(np.int32), tags.rows_of(tag_ids))

    yield from _by_posts(len(post_ids), read)


def _by_posts(posts: int, read: Callable[[int, int], TagChunk]) -> Iterator[Callable[[], TagChunk]]:
    for first in range(0, posts, POSTS_A_CHUNK):
        stop = min(first + POSTS_A_CHUNK, posts)
        yield partial(read, first, stop)


LONGEST_TOKEN = 12
DIGITS = {10: "0-9", 36: "0-9A-Za-z"}
"""By base, the digits of an id as a regular expression writes them; letters count in either case."""


class TagListUnreadable(KwrapError):
    """A `post.tag_list` is not a row of `$ID#` tokens."""


def parse_tag_lists(post_ids: Int64Array, lists: pa.Array, base: int) -> tuple[Int32Array, Int64Array]:
    """The index of the post and the tag id of each token: (tokens,) each, in the order of the text.

    `lists` has no nulls. Raises TagListUnreadable with the first post whose list is something else.
    """
    is_whole = pc.match_substring_regex(lists, rf"^(?:\$[{DIGITS[base]}]{{1,{LONGEST_TOKEN}}}#)*$")
    wrong = np.flatnonzero(~is_whole.to_numpy(zero_copy_only=False))
    if len(wrong):
        text = lists[int(wrong[0])].as_py()
        shown = text if len(text) <= 60 else text[:57] + "…"
        raise TagListUnreadable(
            f"post {post_ids[wrong[0]]}: tag_list {shown!r} is not a row of $ID# tokens with ids in base {base}",
            "The database is damaged or of a layout that kwrap does not know; see `kwrap inspect DB`.",
        )
    split = pc.split_pattern(lists, "#")
    tokens, posts = pc.list_flatten(split), pc.list_parent_indices(split)
    # Behind the last sign of each list nothing follows.
    is_token = pc.not_equal(tokens, "")
    encoded = tokens.filter(is_token).dictionary_encode()
    ids = np.array([int(token[1:], base) for token in encoded.dictionary.to_pylist()], dtype=np.int64)
    return posts.filter(is_token).to_numpy().astype(np.int32), ids[encoded.indices.to_numpy()]
