"""The chunks and time steps at which the loss of posts is measured, the same each time."""

from __future__ import annotations

import numpy as np

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.buckets import BucketAssignment

TRAIN_TIMESTEPS = 1000


def list_timesteps(count: int) -> list[int]:
    """The middles of so many equal parts of the time steps, ascending."""
    return [int((2 * place + 1) * TRAIN_TIMESTEPS / (2 * count)) for place in range(count)]


def cut_chunks(rows: Int64Array, buckets: BucketAssignment, size: int) -> list[list[int]]:
    """Rows of one bucket each, by id, at most `size`: every process cuts them alike."""
    found = []
    of_rows = buckets.bucket_of_image[rows]
    for bucket in np.unique(of_rows).tolist():
        inside = rows[of_rows == bucket]
        found += [inside[start : start + size].tolist() for start in range(0, len(inside), size)]
    return found
