"""Which posts belong together: their parents from the database, and the md5 of their pictures from the selection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.selection_file import read_columns, take_texts
from kohaku_wrap.formats.relations import Relations
from kohaku_wrap.metadata.places import NOWHERE, find_places
from kohaku_wrap.metadata.source import Source


def gather_relations(selection: Path, ids: Int64Array, parents: Int64Array) -> Relations:
    """The given parents and the md5 of the posts `ids` (ascending), which are in the selection."""
    table = read_columns(selection, "id", "md5")
    places = np.searchsorted(table["id"].to_numpy(), ids)
    contents = take_texts(selection, "md5", table["md5"]).take(pa.array(places)).combine_chunks()
    return Relations(ids, parents, contents)


def read_parents(database: Source, ids: Int64Array) -> Int64Array:
    """(ids,) the parent of each post, 0 for none, -1 where the database says nothing of it."""
    parents = np.full(len(ids), -1, dtype=np.int64)
    if not database.edition.has_parents or not len(ids):
        return parents
    query = f"SELECT id, CAST(coalesce(parent_id, 0) AS BIGINT) AS parent FROM ({database.edition.posts}) AS post"
    for found, parent in database.scan_numbers(query):
        places = find_places(ids, found)
        # Of several rows of one post the first counts.
        hits = np.flatnonzero((places != NOWHERE) & (parents[places] < 0))[::-1]
        parents[places[hits]] = np.maximum(parent[hits], 0)
    return parents
