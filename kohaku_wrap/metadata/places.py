"""Where ids stand among ascending ones, for many at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

NOWHERE = -1
"""The place of an id that is not among them."""

DENSE_LIMIT = 1 << 26
"""Ids below this are looked up in one array of 4 bytes an id; larger ones by bisection."""


def place_finder(ids: Int64Array) -> Callable[[Int64Array], npt.NDArray[np.int32]]:
    """A function from ids to their places among `ids`, which ascend; NOWHERE for others."""
    if not len(ids):
        return lambda asked: np.full(len(asked), NOWHERE, dtype=np.int32)
    largest = int(ids[-1])
    if largest < DENSE_LIMIT and ids[0] >= 0:
        dense = np.full(largest + 2, NOWHERE, dtype=np.int32)
        dense[ids] = np.arange(len(ids), dtype=np.int32)
        return lambda asked: dense[np.where((asked >= 0) & (asked <= largest), asked, largest + 1)]

    def bisect(asked: Int64Array) -> npt.NDArray[np.int32]:
        places = np.minimum(np.searchsorted(ids, asked), len(ids) - 1)
        return np.where(ids[places] == asked, places, NOWHERE).astype(np.int32)

    return bisect
