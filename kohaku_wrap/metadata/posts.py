"""Posts as arrays: which filter drops which, the columns of some, favourites by rating."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.metadata.chunks import relation_columns
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.filters import Filter
from kohaku_wrap.metadata.places import NOWHERE, FirstRows, find_places
from kohaku_wrap.metadata.source import DatabaseDamaged, Source
from kohaku_wrap.metadata.tags import TagTable
from kohaku_wrap.metadata.words import split_words

LOCAL = r"^[1-9]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[T ]([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?$"
"""Dates that say no zone."""

MOST_FILTERS = 62
"""Filters that fit the bits of one integer."""


UNKNOWN_NUMBER = -(1 << 31)
"""`score` and `fav_count` of a post where the database has no whole number."""


POST_COLUMNS: tuple[tuple[str, str, pa.DataType], ...] = (
    ("id", "CAST(id AS BIGINT)", pa.int64()),
    ("rating", "rating", pa.int8()),
    ("fav_count", f"coalesce(fav_count, {UNKNOWN_NUMBER})", pa.int32()),
    ("score", f"coalesce(score, {UNKNOWN_NUMBER})", pa.int32()),
    ("created_at", "created_at", pa.string()),
    ("file_ext", "file_ext", pa.string()),
    ("image_width", "coalesce(image_width, 0)", pa.int32()),
    ("image_height", "coalesce(image_height, 0)", pa.int32()),
    ("md5", "coalesce(md5, '')", pa.string()),
)
"""Name, SQL and type of what later steps need of a post."""

POST_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, _, kind in POST_COLUMNS])


class NoZone(KwrapError):
    """The system lacks the time zone of the site."""


class PostDrops(NamedTuple):
    """Which filter drops which post."""

    ids: Int64Array
    """(posts,) ascending."""

    drops: Int64Array
    """(posts,) bit k for filter k."""

    duplicates: int
    """Rows beyond the first of their id, which do not count."""

    in_order: bool
    """Whether the table's rows ascend by id."""


WHOLE_NUMBER = re.compile(r"-?[0-9]+(\.0)?")


def post_ids(source: Source, column: pa.Array) -> Int64Array:
    """The ids of a batch. Raises DatabaseDamaged for a post whose id is no whole number."""
    if column.null_count or not pa.types.is_integer(column.type):
        # Where some are words, all come as texts.
        odd = sum(not WHOLE_NUMBER.fullmatch(str(each)) for each in column.to_pylist())
        raise DatabaseDamaged(
            f"{source.path}: {odd:,} post{' has' if odd == 1 else 's have'} an id that is no whole number",
            "kwrap needs the numbers of the site. Name their column in [metadata.columns] of a dataset file.",
        )
    ids: Int64Array = column.to_numpy().astype(np.int64, copy=False)
    return ids


def bits_sql(conditions: Sequence[str]) -> str:
    """SQL for a whole number whose bit k says whether `conditions[k]` is true; none of them may be NULL."""
    if len(conditions) > MOST_FILTERS:
        raise ValueError(f"{len(conditions)} conditions are more than {MOST_FILTERS}")
    bits = " + ".join(f"CAST(({one}) AS BIGINT) * {1 << bit}" for bit, one in enumerate(conditions)) or "0"
    return f"CAST({bits} AS BIGINT)"


def order_of_posts(source: Source) -> str:
    """SQL that sorts by id, of several rows of one the first before the others."""
    return " ORDER BY id" if source.edition.unique_ids else " ORDER BY id, place"


def read_drops(source: Source, filters: Sequence[Filter], on_posts: Progress = unheard) -> PostDrops:
    """All posts and what drops them. Of several rows of one post the first counts."""
    bits = bits_sql([one.drops for one in filters])
    scanned = [(np.empty(0, dtype=np.int64),) * 2]
    done = 0
    total = source.count_posts()
    order = "" if source.edition.has_tag_strings else order_of_posts(source)
    query = f"SELECT id, {bits} AS drops FROM ({source.edition.posts}) AS post{order}"
    for batch in source.scan(query):
        scanned.append((post_ids(source, batch.column(0)), batch.column(1).to_numpy()))
        done += batch.num_rows
        on_posts(min(done, total), total)
    ids, drops = map(np.concatenate, zip(*scanned, strict=True))
    rows = len(ids)
    in_order = bool((ids[1:] > ids[:-1]).all())
    if not in_order:
        ids, first = np.unique(ids, return_index=True)
        drops = drops[first]
    return PostDrops(ids, drops, rows - len(ids), in_order)


def read_posts(
    source: Source, wanted: Int64Array, on_posts: Progress = unheard, in_order: bool = False
) -> Iterator[pa.RecordBatch]:
    """The posts with the ids `wanted` (ascending) as batches of POST_SCHEMA, ascending.

    `in_order`: the table's rows are known to ascend, so that they need not be sorted.
    """
    if not len(wanted):
        return
    columns = ", ".join(f"{sql} AS {name}" for name, sql, _ in POST_COLUMNS)
    posts = f"({source.edition.posts}) AS post WHERE id BETWEEN {wanted[0]} AND {wanted[-1]}"
    if not (source.edition.has_tag_strings and in_order):
        posts += order_of_posts(source)
    done, last = 0, wanted[0] - 1
    for batch in source.scan(f"SELECT {columns} FROM {posts}"):
        ids = batch.column(0).to_numpy()
        is_first = np.diff(ids, prepend=last) != 0
        kept = batch.filter(pa.array((find_places(wanted, ids) != NOWHERE) & is_first))
        last = ids[-1] if len(ids) else last
        if kept.num_rows:
            arrays = [_as_type(kept.column(number), kind) for number, (_, _, kind) in enumerate(POST_COLUMNS)]
            arrays[4] = with_offsets(arrays[4], source.edition.zone)
            yield pa.RecordBatch.from_arrays(arrays, schema=POST_SCHEMA)
        done += kept.num_rows
        on_posts(done, len(wanted))


def _as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column in the type of POST_SCHEMA; numbers beyond 32 bits become the nearest that they hold."""
    if kind == pa.int32():
        column = pa.array(np.clip(column.to_numpy(), UNKNOWN_NUMBER, -UNKNOWN_NUMBER - 1))
    return column.cast(kind, safe=False)


def with_offsets(dates: pa.Array, zone: str) -> pa.Array:
    """The dates, with the zone's offset at that time where they say none; texts that are no dates stay.

    Raises NoZone.
    """
    plain = np.flatnonzero(pc.match_substring_regex(dates, LOCAL).to_numpy(zero_copy_only=False))
    if not len(plain):
        return dates
    day = pc.utf8_slice_codeunits(dates.take(plain), 0, 10)
    real = {one: _is_day(one) for one in pc.unique(day).to_pylist()}
    plain = plain[np.array([real[one] for one in day.to_pylist()])]
    if not len(plain):
        return dates
    local = pc.replace_substring(dates.take(plain), " ", "T").cast(pa.timestamp("us")).cast(pa.timestamp("ms"), False)
    advice = "Install your system's table of zones, such as: sudo apt install tzdata"
    with refusing(NoZone, f"{zone}: this system knows no such time zone", advice):
        moments = pc.assume_timezone(local, zone, ambiguous="earliest", nonexistent="earliest")
    written = pc.strftime(moments, format="%Y-%m-%dT%H:%M:%S%z")
    parts = pc.utf8_slice_codeunits(written, 0, 26), pc.utf8_slice_codeunits(written, 26)
    mask = np.zeros(len(dates), dtype=bool)
    mask[plain] = True
    return pc.replace_with_mask(dates, pa.array(mask), pc.binary_join_element_wise(*parts, ":"))


def _is_day(text: str) -> bool:
    with suppress(ValueError):
        return bool(datetime.date.fromisoformat(text))
    return False


def count_favourites(source: Source) -> dict[int, tuple[Int64Array, Int64Array]]:
    """For each known rating, the values of `fav_count` over all posts, ascending, and how many posts have each."""
    parts: dict[int, list[tuple[Int64Array, Int64Array]]] = {}
    first_rows = None if source.edition.unique_ids else FirstRows()
    columns = "id, rating, coalesce(fav_count, 0) AS fav_count, CAST(fav_count IS NOT NULL AS BIGINT) AS known"
    for ids, ratings, favourites, known in source.scan_numbers(
        f"SELECT {columns} FROM ({source.edition.posts}) AS post"
    ):
        counted = (ratings >= 0) & (known == 1)
        if first_rows:
            counted &= first_rows.keep(ids)
        for rating in np.unique(ratings[counted]).tolist():
            some = favourites[counted & (ratings == rating)]
            parts.setdefault(rating, []).append(np.unique(some, return_counts=True))
    return {rating: merge_counts(some) for rating, some in sorted(parts.items())}


def merge_counts(parts: Sequence[tuple[Int64Array, Int64Array]]) -> tuple[Int64Array, Int64Array]:
    """Values and counts of several tallies as one."""
    values, places = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([counts for _, counts in parts]))
    return values, counts


def posts_with_tags(source: Source, tags: TagTable, tag_ids: Sequence[int]) -> dict[int, Int64Array]:
    """For each tag id, the ids of the posts that have it, ascending."""
    found: dict[int, list[Int64Array]] = {tag_id: [] for tag_id in tag_ids}
    empty = np.empty(0, dtype=np.int64)
    if not tag_ids:
        return {}
    if source.edition.has_tag_strings:
        names = pa.array([tags.names[int(row)] for row in tags.rows_of(np.array(tag_ids))])
        first_rows = FirstRows()
        for batch in source.scan(f"SELECT id, tags FROM ({source.edition.posts}) AS post"):
            ids = batch.column(0).to_numpy()
            owners, tokens = split_words(batch.column(1))
            places = pc.fill_null(pc.index_in(tokens, value_set=names), -1).to_numpy()
            places = np.where(first_rows.keep(ids)[owners], places, -1)
            posts = ids[owners]
            for number, tag_id in enumerate(tag_ids):
                found[tag_id].append(posts[places == number])
    elif isinstance(source, Database) and not source.layout.has_relation:
        for tag_id in tag_ids:
            token = f"${np.base_repr(tag_id, source.token_base)}#"
            query = f"SELECT id FROM post WHERE instr(upper(tag_list), '{token}') > 0{source.of_first_rows} ORDER BY id"
            found[tag_id] = [posts for (posts,) in source.scan_numbers(query)]
    else:
        listed = ", ".join(map(str, tag_ids))
        post, tag = relation_columns(source)
        query = f"SELECT {post} AS post_id, {tag} AS tag_id FROM posttagrelation"
        for posts, some in source.scan_numbers(f"{query} WHERE {tag} IN ({listed}) AND post_id IS NOT NULL"):
            for tag_id in tag_ids:
                found[tag_id].append(posts[some == tag_id])
    return {tag_id: np.unique(np.concatenate([empty, *parts])) for tag_id, parts in found.items()}
