"""`captions.arrow`: the columns that kwrap's own dataset maps, written in pieces and compared with the last ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.dataset.captions.formats import digest_rows
from kohaku_wrap.errors import KwrapError

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


class DamagedCaptions(KwrapError):
    """The rows of a captions file are not those that were written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path}: damaged: {what}", "Make it again with `kwrap caption`: the same rows have the same digest."
        )


class ColumnsWriter:
    """Writes `captions.arrow` into an open binary file; the schema's metadata gets the digest of all rows.

    The digest is the sha256 of `digest_rows`, the same for the same rows however they came in pieces.
    """

    def __init__(self, stream: IO[bytes], about: Mapping[str, Any]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._finished = False
        schema = pa.schema(FIELDS, metadata={METADATA_KEY: json.dumps({"digest": NO_DIGEST, **about}).encode()})
        self._writer = pa.ipc.new_file(stream, schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self._writer.close()

    def finish(self) -> None:
        """Write what comes after the last row; the file can be read from then on."""
        if not self._finished:
            self._finished = True
            self._writer.close()
            self._write_digest()
            self._stream.flush()

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


def check_columns(path: Path) -> None:
    """Read all rows and raise DamagedCaptions unless they are those that were written.

    By the digest over the rows, 4 s for 5.2 million; a file that records none is only read.
    """
    digest = hashlib.sha256()
    try:
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source)
            recorded = json.loads((reader.schema.metadata or {}).get(METADATA_KEY, b"{}")).get("digest")
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                ids, files, widths, heights, captions = (batch.column(field.name) for field in FIELDS)
                rows = digest_rows(
                    ids.to_numpy(), files, widths.to_numpy(), heights.to_numpy(), captions.cast(pa.string())
                )
                digest.update(rows)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedCaptions(path, str(error)) from error
    if recorded and recorded != digest.hexdigest():
        raise DamagedCaptions(path, f"its rows have the digest {digest.hexdigest()[:12]}…, not {recorded[:12]}…")


class EarlierCaptions:
    """The rows of the `captions.arrow` that is there, to count what changes; none where there is no readable one.

    Captions are read a batch at a time and not mapped: mapped, the whole file would count as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: Any = None
        self._batch: tuple[int, Any] = (-1, None)
        self.ids = np.empty(0, dtype=np.int64)
        starts = [0]
        try:
            batches = list(self._read_column(0))
            self._reader = pa.ipc.open_file(pa.OSFile(str(path)))
        except (OSError, pa.ArrowInvalid, KeyError):
            batches = []
        for column in batches:
            starts.append(starts[-1] + len(column))
        if batches:
            self.ids = np.concatenate([column.to_numpy() for column in batches])
        self._starts = np.array(starts)

    def _read_column(self, number: int) -> Iterator[pa.Array]:
        """One column of each batch; the others are not read."""
        with pa.OSFile(str(self._path)) as source:
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[number]))
            for batch in range(reader.num_record_batches):
                yield reader.get_batch(batch).column(0)

    def count_same(self, ids: npt.NDArray[np.int64], captions: pa.Array) -> int:
        """How many of these captions are there already, word for word; `ids` is ascending, as from call to call."""
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
                before = self._captions(number).take(pa.array(old + begin - int(self._starts[number])))
                after = captions.cast(pa.large_string()).take(pa.array(new))
                same += int(pc.sum(pc.equal(before, after)).as_py() or 0)
        return same

    def _captions(self, number: int) -> pa.Array:
        """The captions of a batch; the last one read is kept."""
        if self._batch[0] != number:
            self._batch = (number, self._reader.get_batch(number).column("caption"))
        return self._batch[1]

    def files_gone(self, ids: npt.NDArray[np.int64]) -> list[str]:
        """The files of rows whose ids are not among `ids`."""
        gone = ~np.isin(self.ids, ids, assume_unique=True)
        if not gone.any():
            return []
        files: list[str] = []
        for column, start in zip(self._read_column(1), self._starts, strict=False):
            files += column.filter(pa.array(gone[start : start + len(column)])).to_pylist()
        return files
