"""`captions.arrow`: the columns that kwrap's own dataset maps, written in pieces and compared with the last ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.dataset.captions.formats import digest_rows

METADATA_KEY = b"kwrap"
NO_DIGEST = "0" * 64
"""Stands in the file until all rows are written; the digest has the same length and takes its place."""

FIELDS = (
    pa.field("id", pa.int64(), nullable=False),
    pa.field("file", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("caption", pa.large_string(), nullable=False),
)


class ColumnsWriter:
    """Writes `captions.arrow` into an open binary file; the schema's metadata gets the digest of all rows.

    The digest is the sha256 of `digest_rows`, the same for the same rows however they came in pieces.
    """

    def __init__(self, stream: IO[bytes], about: Mapping[str, Any]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        schema = pa.schema(FIELDS, metadata={METADATA_KEY: json.dumps({"digest": NO_DIGEST, **about}).encode()})
        self._writer = pa.ipc.new_file(stream, schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if error is None:
            self._write_digest()

    def write(
        self,
        ids: npt.NDArray[np.int64],
        files: pa.Array,
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
        captions: pa.Array,
    ) -> None:
        """Append rows, by ascending id."""
        if not len(ids):
            return
        self._digest.update(digest_rows(ids, files, widths, heights, captions))
        columns = [pa.array(ids), files, pa.array(widths), pa.array(heights), captions.cast(pa.large_string())]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=pa.schema(FIELDS)))

    @property
    def digest(self) -> str:
        """Of the rows so far."""
        return self._digest.hexdigest()

    def _write_digest(self) -> None:
        """Put the digest where its place was kept: in the schema at the head and in the footer."""
        self._stream.flush()
        end = self._stream.seek(0, 2)
        for start in (0, max(0, end - (1 << 20))):
            self._stream.seek(start)
            piece = self._stream.read(1 << 20)
            place = piece.find(NO_DIGEST.encode())
            if place >= 0:
                self._stream.seek(start + place)
                self._stream.write(self.digest.encode())
        self._stream.seek(0, 2)


class EarlierCaptions:
    """The rows of the `captions.arrow` that is there, to count what changes; none where there is no readable one."""

    def __init__(self, path: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            self.ids = table.column("id").to_numpy()
            self.files = table.column("file")
            self._captions = table.column("caption")
        except (OSError, pa.ArrowInvalid, KeyError):
            self.ids = np.empty(0, dtype=np.int64)
            self.files = self._captions = pa.chunked_array([], type=pa.string())

    def count_same(self, ids: npt.NDArray[np.int64], captions: pa.Array) -> int:
        """How many of these captions are there already, word for word; `ids` is ascending."""
        if not len(ids) or not len(self.ids):
            return 0
        first = int(np.searchsorted(self.ids, ids[0]))
        stop = int(np.searchsorted(self.ids, ids[-1], side="right"))
        _, old, new = np.intersect1d(self.ids[first:stop], ids, assume_unique=True, return_indices=True)
        if not len(old):
            return 0
        before = self._captions.slice(first, stop - first).combine_chunks().take(pa.array(old))
        same = pc.equal(before, captions.cast(pa.large_string()).take(pa.array(new)))
        return int(pc.sum(same).as_py() or 0)

    def files_gone(self, ids: npt.NDArray[np.int64]) -> list[str]:
        """The files of rows whose ids are not among `ids`."""
        gone = np.flatnonzero(~np.isin(self.ids, ids, assume_unique=True))
        return list(self.files.take(pa.array(gone)).to_pylist()) if len(gone) else []
