"""Tags whose rows are in no order, sorted by post through temporary files with bounded memory."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.parallel import map_in_order

ROWS_A_PARTITION = 1 << 19
"""About as many are sorted at once, however many there are."""

TAGS_A_POST = 128
"""More than posts have on average: no partition is smaller, however far apart the rowids are that `rows` counts."""

BYTES_A_ROW = 8
"""Two numbers of 4 bytes."""

Rows = tuple[Int32Array, Int32Array]
"""The place of each row's post among the wanted ones, and the row of its tag."""


def sorted_pieces(
    rows: int, batches: Iterable[Callable[[], Rows]], posts: int, folder: Path | None, threads: int
) -> Iterator[Callable[[], TagChunk]]:
    """Chunks of tags by post out of `batches` of them, which keep their order within a post.

    `rows`: about how many there are in all; `posts`: how many posts are wanted. The rows go to a file without a name in
    `folder`, 8 bytes each, each batch by stretches of posts, which are sorted in memory one at a time.
    """
    posts_a_partition = max(ROWS_A_PARTITION // TAGS_A_POST, posts * ROWS_A_PARTITION // max(rows, ROWS_A_PARTITION))
    firsts = range(0, posts, posts_a_partition)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def find(batch: Callable[[], Rows]) -> tuple[Int32Array, Int64Array]:
        """Rows by partition: (rows, 2) of place and tag row, and where each partition begins and the last one ends."""
        pairs = np.stack(batch(), axis=1).astype(np.int32, copy=False)
        partition = pairs[:, 0] // posts_a_partition
        if (partition[1:] < partition[:-1]).any():
            order = np.argsort(partition, kind="stable")
            pairs, partition = pairs[order], partition[order]
        return pairs, np.searchsorted(partition, np.arange(len(firsts) + 1))

    stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by the piece that is read last
    try:
        edges, rows_written = [], 0
        for pairs, bounds in map_in_order(find, batches, threads):
            stream.write(pairs.tobytes())
            edges.append(bounds + rows_written)
            rows_written += len(pairs)
        stream.flush()
    except BaseException:
        stream.close()
        raise
    if not firsts:
        stream.close()
    spilled = _SpilledRows(stream, np.array(edges, dtype=np.int64).reshape(-1, len(firsts) + 1), len(firsts))
    for number, first in enumerate(firsts):
        yield partial(spilled.sort_partition, number, first, min(first + posts_a_partition, posts))


class _SpilledRows:
    """A file of rows, batch after batch, each by partition; every partition is read once, in any thread."""

    def __init__(self, stream: IO[bytes], edges: Int64Array, partitions: int) -> None:
        """`edges`: (batches, partitions + 1) the row of the file at which each partition of each batch begins."""
        self._stream = stream
        self._edges = edges
        self._left = partitions
        self._lock = threading.Lock()

    def sort_partition(self, number: int, first: int, stop: int) -> TagChunk:
        """The rows of the posts from `first` to before `stop`."""
        parts = [
            os.pread(self._stream.fileno(), (end - begin) * BYTES_A_ROW, begin * BYTES_A_ROW)
            for begin, end in self._edges[:, number : number + 2].tolist()
            if end > begin
        ]
        with self._lock:
            self._left -= 1
            if not self._left:
                self._stream.close()
        pairs = np.frombuffer(b"".join(parts), dtype=np.int32).reshape(-1, 2)
        if (pairs[1:, 0] >= pairs[:-1, 0]).all():
            return TagChunk(first, stop, pairs[:, 0] - np.int32(first), pairs[:, 1])
        # Sorting (place, row) as one number keeps the table's order within a post and is faster than a stable argsort.
        keys = (pairs[:, 0].astype(np.int64) << 32) | np.arange(len(pairs), dtype=np.int64)
        keys.sort()
        order = keys & 0xFFFF_FFFF
        return TagChunk(first, stop, pairs[order, 0] - np.int32(first), pairs[order, 1])
