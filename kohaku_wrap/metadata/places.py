"""Where ids stand among ascending ones, and which rows are the first of their id, for many at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kohaku_wrap.arrays import BoolArray, Int32Array, Int64Array

NOWHERE = -1
"""The place of an id that is not among them."""

DENSE_LIMIT = 1 << 26
"""Ids below this are looked up in one array of 4 bytes an id; larger ones by bisection."""

DENSE_IDS = 1 << 27
"""Ids below this are remembered in an array of a byte each."""


def place_finder(ids: Int64Array) -> Callable[[Int64Array], Int32Array]:
    """A function from ids to their places among `ids`, which ascend; NOWHERE for others."""
    largest = int(ids[-1]) if len(ids) else DENSE_LIMIT
    if largest < DENSE_LIMIT and ids[0] >= 0:
        dense = np.full(largest + 2, NOWHERE, dtype=np.int32)
        dense[ids] = np.arange(len(ids), dtype=np.int32)
        return lambda asked: dense[np.where((asked >= 0) & (asked <= largest), asked, largest + 1)]
    return lambda asked: find_places(ids, asked).astype(np.int32)


def find_places(ids: Int64Array, asked: Int64Array) -> Int64Array:
    """(asked,) the place of each among `ids`, which ascend; NOWHERE for others. By bisection, for a few calls."""
    if not len(ids):
        return np.full(len(asked), NOWHERE)
    places = np.minimum(np.searchsorted(ids, asked), len(ids) - 1)
    return np.where(ids[places] == asked, places, NOWHERE)


class FirstRows:
    """Which rows are the first of their id, where a set lists some posts twice."""

    def __init__(self) -> None:
        self._dense = np.zeros(1 << 16, dtype=bool)
        self._sparse: set[int] = set()

    def keep(self, ids: Int64Array) -> BoolArray:
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
