"""Posts as arrays: which filter drops which, the columns of some, favourites by rating."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.files import Progress
from kohaku_wrap.metadata.database import Database, DatabaseDamaged
from kohaku_wrap.metadata.filters import EXTENSION_SQL, RATING_SQL, Filter, number_sql, size_sql

Int64Array = npt.NDArray[np.int64]

MOST_FILTERS = 62
"""Filters that fit the bits of one integer."""


UNKNOWN_NUMBER = -(1 << 31)
"""`score` and `fav_count` of a post where the database has no whole number."""


def _int32(number: str, unknown: int) -> str:
    """SQL for a whole number, the nearest one that 32 bits hold; `unknown` where it is NULL."""
    return f"coalesce(max(min({number}, 2147483647), -2147483648), {unknown})"


POST_COLUMNS: tuple[tuple[str, str, pa.DataType], ...] = (
    ("id", "CAST(id AS INTEGER)", pa.int64()),
    ("rating", RATING_SQL, pa.int8()),
    ("fav_count", _int32(number_sql("fav_count"), UNKNOWN_NUMBER), pa.int32()),
    ("score", _int32(number_sql("score"), UNKNOWN_NUMBER), pa.int32()),
    ("created_at", "CAST(coalesce(created_at, '') AS TEXT)", pa.string()),
    ("file_ext", f"CAST({EXTENSION_SQL} AS TEXT)", pa.string()),
    ("image_width", _int32(size_sql("image_width"), 0), pa.int32()),
    ("image_height", _int32(size_sql("image_height"), 0), pa.int32()),
    ("md5", "CAST(coalesce(md5, '') AS TEXT)", pa.string()),
)
"""Name, SQL and type of what later steps need of a post."""

UNKNOWN_FAVOURITES = UNKNOWN_NUMBER

POST_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, _, kind in POST_COLUMNS])


def read_drops(
    database: Database, filters: Sequence[Filter], on_posts: Progress | None = None
) -> tuple[Int64Array, Int64Array]:
    """All post ids, ascending, and for each the filters that drop it: bit k for `filters[k]`."""
    if len(filters) > MOST_FILTERS:
        raise ValueError(f"{len(filters)} filters are more than {MOST_FILTERS}")
    bits = " + ".join(f"({one.drops}) * {1 << bit}" for bit, one in enumerate(filters)) or "0"
    scanned = [(np.empty(0, dtype=np.int64),) * 2]
    done = 0
    total = int(database.value("SELECT max(rowid) FROM post") or 0) if on_posts else 0
    for ids, drops in database.scan_numbers(f"SELECT id, CAST({bits} AS INTEGER) FROM post ORDER BY id"):
        scanned.append((ids, drops))
        done += len(ids)
        if on_posts:
            on_posts(min(done, total), total)
    all_ids, all_drops = map(np.concatenate, zip(*scanned, strict=True))
    if (all_ids[1:] <= all_ids[:-1]).any():
        raise DatabaseDamaged(f"{database.path}: a post id occurs twice", "Download or copy it again.")
    return all_ids, all_drops


def read_posts(database: Database, wanted: Int64Array, on_posts: Progress | None = None) -> Iterator[pa.RecordBatch]:
    """The posts with the ids `wanted` (ascending) as batches of POST_SCHEMA, ascending."""
    if not len(wanted):
        return
    columns = ", ".join(sql for _, sql, _ in POST_COLUMNS)
    query = f"SELECT {columns} FROM post WHERE id BETWEEN {wanted[0]} AND {wanted[-1]} ORDER BY id"
    done = 0
    for batch in database.scan(query):
        ids = batch.column(0).to_numpy()
        places = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
        kept = batch.filter(pa.array(wanted[places] == ids))
        if kept.num_rows:
            arrays = [kept.column(number).cast(kind, safe=False) for number, (_, _, kind) in enumerate(POST_COLUMNS)]
            yield pa.RecordBatch.from_arrays(arrays, schema=POST_SCHEMA)
        done += kept.num_rows
        if on_posts:
            on_posts(done, len(wanted))


def count_favourites(database: Database) -> dict[int, tuple[Int64Array, Int64Array]]:
    """For each known rating, the values of `fav_count` over all posts, ascending, and how many posts have each."""
    parts: dict[int, list[tuple[Int64Array, Int64Array]]] = {}
    favourites_sql = number_sql("fav_count")
    graded = f"({favourites_sql}) IS NOT NULL AND {RATING_SQL} >= 0"
    query = f"SELECT {RATING_SQL}, {favourites_sql} FROM post WHERE {graded}"
    for ratings, favourites in database.scan_numbers(query):
        for rating in np.unique(ratings).tolist():
            parts.setdefault(rating, []).append(np.unique(favourites[ratings == rating], return_counts=True))
    return {rating: merge_counts(some) for rating, some in sorted(parts.items())}


def merge_counts(parts: Sequence[tuple[Int64Array, Int64Array]]) -> tuple[Int64Array, Int64Array]:
    """Values and counts of several tallies as one."""
    values, places = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([counts for _, counts in parts]))
    return values, counts


def posts_with_tags(database: Database, tag_ids: Sequence[int]) -> dict[int, Int64Array]:
    """For each tag id, the ids of the posts that have it, ascending."""
    found: dict[int, list[Int64Array]] = {tag_id: [] for tag_id in tag_ids}
    if not database.layout.has_relation:
        for tag_id in tag_ids:
            token = f"${np.base_repr(tag_id, database.token_base)}#"
            query = f"SELECT id FROM post WHERE instr(upper(tag_list), '{token}') > 0 ORDER BY id"
            found[tag_id] = [posts for (posts,) in database.scan_numbers(query)]
    elif tag_ids:
        listed = ", ".join(map(str, tag_ids))
        query = f"SELECT post_id, tag_id FROM posttagrelation WHERE tag_id IN ({listed}) AND post_id IS NOT NULL"
        for posts, tags in database.scan_numbers(query):
            for tag_id in tag_ids:
                found[tag_id].append(posts[tags == tag_id])
    empty = np.empty(0, dtype=np.int64)
    return {tag_id: np.unique(np.concatenate([empty, *parts])) for tag_id, parts in found.items()}


def database_digest(database: Database) -> str:
    """A cheap fingerprint of the database's content: its layout and the ends and sizes of its tables.

    Copies have the same one, with or without indexes; reading it takes no scan.
    """
    questions = ["SELECT max(id) FROM post", "SELECT min(id) FROM post", "SELECT max(id) FROM tag"]
    if database.layout.has_relation:
        if database.has_row_ids:
            questions.append("SELECT max(rowid) FROM posttagrelation")
    else:
        questions.append("SELECT tag_list FROM post ORDER BY id DESC LIMIT 1")
    questions.append("SELECT created_at || ' ' || fav_count || ' ' || score FROM post ORDER BY id DESC LIMIT 1")
    answers = [database.layout.value, *(str(database.value(question)) for question in questions)]
    return hashlib.sha256("\n".join(answers).encode()).hexdigest()
