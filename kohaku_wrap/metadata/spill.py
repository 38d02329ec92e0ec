"""A relation whose rows are in no order, sorted by post through temporary files with bounded memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from kohaku_wrap.metadata.chunks import TagChunk, relation_rows
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.parallel import map_in_order
from kohaku_wrap.metadata.places import place_finder
from kohaku_wrap.metadata.tags import TagTable

Int64Array = npt.NDArray[np.int64]

ROWS_A_PARTITION = 1 << 21
MOST_PARTITIONS = 256

Rows = tuple[Int64Array, ...]


def sorted_pieces(
    database: Database, tags: TagTable, post_ids: Int64Array, folder: Path, threads: int
) -> Iterator[Callable[[], TagChunk]]:
    """Chunks of the relation's wanted rows by post; rows of one post keep the order of the table.

    The rows go to files without a name in `folder` by stretches of posts, 8 bytes each, that are sorted in memory.
    """
    first_row, last_row = relation_rows(database) if database.has_row_ids else (0, -1)
    rows = last_row - first_row + 1
    partitions = min(max(1, -(-rows // ROWS_A_PARTITION)), MOST_PARTITIONS, len(post_ids))
    posts_a_partition = -(-len(post_ids) // partitions)
    place_of = place_finder(post_ids)

    def find(read: Rows) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Rows of wanted posts by partition: (rows, 2) of place and tag row, and the partition of each."""
        places = place_of(read[0])
        wanted = np.flatnonzero(places >= 0)
        pairs = np.stack([places[wanted], tags.rows_of(read[1][wanted])], axis=1).astype(np.int32)
        partition = pairs[:, 0] // posts_a_partition
        order = np.argsort(partition.astype(np.uint16), kind="stable")
        return pairs[order], np.searchsorted(partition[order], np.arange(partitions + 1))

    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(partitions)]
        for pairs, bounds in map_in_order(find, _all_rows(database), threads):
            for number in np.flatnonzero(np.diff(bounds)).tolist():
                streams[number].write(pairs[bounds[number] : bounds[number + 1]].tobytes())
        # From here on each file is closed, and with it gone, by the piece that sorts it.
        stack.pop_all()
    for number, stream in enumerate(streams):
        first = number * posts_a_partition
        stop = min(first + posts_a_partition, len(post_ids))
        if stop > first:
            yield partial(_sort_partition, stream, first, stop)


def _all_rows(database: Database) -> Iterator[Rows]:
    """Every row of the relation in the order of the table."""
    query = "SELECT post_id, tag_id FROM posttagrelation WHERE post_id IS NOT NULL AND tag_id IS NOT NULL"
    return database.scan_numbers(query + " ORDER BY rowid" * database.has_row_ids)


def _sort_partition(stream: IO[bytes], first: int, stop: int) -> TagChunk:
    with stream:
        stream.seek(0)
        pairs = np.frombuffer(stream.read(), dtype=np.int32).reshape(-1, 2)
    # Sorting (place, row) as one number keeps the table's order within a post and is faster than a stable argsort.
    keys = (pairs[:, 0].astype(np.int64) << 32) | np.arange(len(pairs), dtype=np.int64)
    keys.sort()
    order = keys & 0xFFFF_FFFF
    return TagChunk(first, stop, pairs[order, 0] - np.int32(first), pairs[order, 1])
