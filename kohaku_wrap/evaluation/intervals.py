"""Means with intervals by the bootstrap, the same numbers each time.

Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979; percentiles of resampled means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kohaku_wrap.streams import draws, stream_key

RESAMPLES = 2000
SHARE = 0.95
RESAMPLES_A_BLOCK = 100


def bootstrap_mean(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float] | None:
    """`mean`, and `low` and `high`, below and above which 2.5 % of the resampled means lie; None without a value.

    Where the mean would lie for other posts or characters of the same kind; of one value it has no width. For paired
    results: of their differences.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return None
    key, means = stream_key("bootstrap", ""), np.empty(RESAMPLES)
    for first in range(0, RESAMPLES, RESAMPLES_A_BLOCK):
        counters = np.arange(first * len(numbers), (first + RESAMPLES_A_BLOCK) * len(numbers), dtype=np.uint64)
        chosen = (draws(key, counters) % np.uint64(len(numbers))).astype(np.int64)
        means[first : first + RESAMPLES_A_BLOCK] = numbers[chosen].reshape(-1, len(numbers)).mean(axis=1)
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return {"mean": float(numbers.mean()), "low": float(low), "high": float(high)}
