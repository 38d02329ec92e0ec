"""Tags that stand as words in the posts' own column: split, counted and looked up many posts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.metadata.places import place_finder
from kohaku_wrap.metadata.source import Source

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

DENSE_IDS = 1 << 27
"""Ids below this are remembered in an array of a byte each."""


def split_tags(texts: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """The words of texts without nulls, blanks between them: the index of the text, and the word."""
    split = pc.ascii_split_whitespace(texts)
    words, owners = pc.list_flatten(split), pc.list_parent_indices(split)
    there = pc.not_equal(words, "")
    if not pc.all(there).as_py():
        words, owners = words.filter(there), owners.filter(there)
    return owners.to_numpy(), words


def count_tags(texts: pa.Array) -> tuple[list[str], list[int]]:
    """The different words of texts, and how often each stands there."""
    counted = pc.value_counts(split_tags(texts)[1])
    return counted.field("values").to_pylist(), counted.field("counts").to_pylist()


def find_rows(texts: pa.Array, row_of_name: Mapping[str, int], no_row: int) -> tuple[Int32Array, Int32Array]:
    """For each word of the texts its text's index and the row of its tag, `no_row` for a word that is no tag."""
    owners, words = split_tags(texts)
    encoded = words.dictionary_encode()
    rows = np.array([row_of_name.get(word, no_row) for word in encoded.dictionary.to_pylist()], dtype=np.int32)
    return owners.astype(np.int32), rows[encoded.indices.to_numpy()] if len(rows) else np.empty(0, dtype=np.int32)


class FirstRows:
    """Which rows are the first of their id, where a set lists some posts twice."""

    def __init__(self) -> None:
        self._dense = np.zeros(1 << 16, dtype=bool)
        self._sparse: set[int] = set()

    def keep(self, ids: Int64Array) -> npt.NDArray[np.bool_]:
        """(rows,) whether the id was not among earlier rows, here or in earlier calls."""
        first = np.zeros(len(ids), dtype=bool)
        first[np.unique(ids, return_index=True)[1]] = True
        dense = (ids >= 0) & (ids < DENSE_IDS)
        some = ids[dense]
        if len(some):
            if (largest := int(some.max())) >= len(self._dense):
                grown = np.zeros(min(DENSE_IDS, max(2 * len(self._dense), largest + 1)), dtype=bool)
                grown[: len(self._dense)] = self._dense
                self._dense = grown
            first[dense] &= ~self._dense[some]
            self._dense[some] = True
        for place in np.flatnonzero(~dense).tolist():
            first[place] &= int(ids[place]) not in self._sparse
            self._sparse.add(int(ids[place]))
        return first


def wanted_texts(source: Source, post_ids: Int64Array, rows: int) -> Iterator[tuple[Int32Array, pa.Array]]:
    """The tags of the wanted posts (ascending) in the order of the table, at most `rows` at once: place and text."""
    place_of = place_finder(post_ids)
    first_rows = FirstRows()
    query = f"SELECT id, tags FROM ({source.edition.posts}) AS post WHERE id BETWEEN {post_ids[0]} AND {post_ids[-1]}"
    for batch in source.scan(query):
        ids = batch.column(0).to_numpy()
        places = place_of(ids)
        kept = np.flatnonzero((places >= 0) & first_rows.keep(ids))
        texts = batch.column(1) if len(kept) == len(ids) else batch.column(1).take(pa.array(kept))
        for start in range(0, len(kept), rows):
            yield places[kept[start : start + rows]], texts.slice(start, rows)
