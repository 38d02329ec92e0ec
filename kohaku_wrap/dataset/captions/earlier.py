"""The captions that an earlier call wrote into a folder, to count what changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.formats.caption_rows import FIELDS, read_batches


class EarlierCaptions:
    """The rows of the `captions.arrow` that is there, to count what changes; none where there is no readable one.

    Captions are read a batch at a time and not mapped: mapped, the whole file would count as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: Any = None
        self._batch: tuple[int, Any] = (-1, None)
        try:
            ids = [batch.column(0).to_numpy() for batch in read_batches(path, "id")]
            self._reader = pa.ipc.open_file(pa.OSFile(str(path)))
            if any(self._reader.schema.field(each.name).type != each.type for each in FIELDS):
                ids = []
        except (OSError, pa.ArrowException, KeyError):
            ids = []
        self.ids = np.concatenate([np.empty(0, dtype=np.int64), *ids])
        self._starts = np.cumsum([0, *map(len, ids)])

    def count_same(self, ids: Int64Array, captions: pa.Array, texts: pa.Array | None = None) -> int:
        """How many of these captions are there already, word for word, with their texts.

        `ids` is ascending, as from call to call.
        """
        if not len(ids) or not len(self.ids):
            return 0
        first = int(np.searchsorted(self.ids, ids[0]))
        stop = int(np.searchsorted(self.ids, ids[-1], side="right"))
        same = 0
        for number in range(len(self._starts) - 1):
            begin, end = max(first, int(self._starts[number])), min(stop, int(self._starts[number + 1]))
            if begin >= end:
                continue
            _, old, new = np.intersect1d(self.ids[begin:end], ids, assume_unique=True, return_indices=True)
            if len(old):
                rows = pa.array(old + begin - int(self._starts[number]))
                batch = self._batch_of(number)
                equal = pc.equal(batch["caption"].take(rows), captions.cast(pa.large_string()).take(pa.array(new)))
                if texts is not None or "text" in batch.schema.names:
                    after = pa.array([""] * len(new)) if texts is None else texts.take(pa.array(new))
                    before = batch["text"].take(rows) if "text" in batch.schema.names else pa.array([""] * len(new))
                    equal = pc.and_(equal, pc.equal(before, after.cast(before.type)))
                same += int(pc.sum(equal).as_py() or 0)
        return same

    def _batch_of(self, number: int) -> pa.RecordBatch:
        """A batch of the file; the last one read is kept."""
        if self._batch[0] != number:
            self._batch = (number, self._reader.get_batch(number))
        return self._batch[1]

    def files_gone(self, ids: Int64Array) -> list[str]:
        """The files of rows whose ids are not among `ids`."""
        gone = ~np.isin(self.ids, ids, assume_unique=True)
        if not gone.any():
            return []
        files: list[str] = []
        for batch, start in zip(read_batches(self._path, "file"), self._starts, strict=False):
            files += batch.column(0).filter(pa.array(gone[start : start + batch.num_rows])).to_pylist()
        return files
