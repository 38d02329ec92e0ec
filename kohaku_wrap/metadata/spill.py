"""Tags whose rows are in no order, sorted by post through temporary files with bounded memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.parallel import map_in_order

ROWS_A_PARTITION = 1 << 19
MOST_PARTITIONS = 256

Rows = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""The place of each row's post among the wanted ones, and the row of its tag."""


def sorted_pieces(
    rows: int, batches: Iterable[Callable[[], Rows]], posts: int, folder: Path | None, threads: int
) -> Iterator[Callable[[], TagChunk]]:
    """Chunks of tags by post out of `batches` of them, which keep their order within a post.

    `rows`: about how many there are in all; `posts`: how many posts are wanted. The rows go to files without a name in
    `folder` by stretches of posts, 8 bytes each, that are sorted in memory.
    """
    partitions = max(1, min(-(-rows // ROWS_A_PARTITION), MOST_PARTITIONS, posts))
    posts_a_partition = max(1, -(-posts // partitions))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def find(batch: Callable[[], Rows]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Rows by partition: (rows, 2) of place and tag row, and the partition of each."""
        pairs = np.stack(batch(), axis=1).astype(np.int32, copy=False)
        partition = (pairs[:, 0] // posts_a_partition).astype(np.uint16)
        if (partition[1:] < partition[:-1]).any():
            order = np.argsort(partition, kind="stable")
            pairs, partition = pairs[order], partition[order]
        return pairs, np.searchsorted(partition, np.arange(partitions + 1))

    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(partitions)]
        for pairs, bounds in map_in_order(find, batches, threads):
            for number in np.flatnonzero(np.diff(bounds)).tolist():
                streams[number].write(pairs[bounds[number] : bounds[number + 1]].tobytes())
        # From here on each file is closed, and with it gone, by the piece that sorts it.
        stack.pop_all()
    for number, stream in enumerate(streams):
        first = number * posts_a_partition
        stop = min(first + posts_a_partition, posts)
        if stop > first:
            yield partial(_sort_partition, stream, first, stop)


def _sort_partition(stream: IO[bytes], first: int, stop: int) -> TagChunk:
    with stream:
        stream.seek(0)
        pairs = np.frombuffer(stream.read(), dtype=np.int32).reshape(-1, 2)
    if (pairs[1:, 0] >= pairs[:-1, 0]).all():
        return TagChunk(first, stop, pairs[:, 0] - np.int32(first), pairs[:, 1])
    # Sorting (place, row) as one number keeps the table's order within a post and is faster than a stable argsort.
    keys = (pairs[:, 0].astype(np.int64) << 32) | np.arange(len(pairs), dtype=np.int64)
    keys.sort()
    order = keys & 0xFFFF_FFFF
    return TagChunk(first, stop, pairs[order, 0] - np.int32(first), pairs[order, 1])
