"""Rows of captions.arrow written under one digest, and held against it when they are read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.formats.caption_rows import (
    FIELDS,
    FORMAT,
    GROUP_FIELDS,
    SUBSETS_FORMAT,
    TEXT_FIELDS,
    Subset,
    read_batches,
    refuse_newer,
)
from kohaku_wrap.formats.schema_notes import read_notes, write_notes

NO_DIGEST = "0" * 64
"""Stands in the file until all rows are written; the digest has the same length and takes its place."""

FILE_END_BYTES = 10
"""Of an Arrow file, behind its footer: the footer's length and six letters."""

HEAD_BYTES = 1 << 16
"""Of a captions file, within which the digest stands: it comes first in the schema's metadata."""


class DamagedCaptions(KwrapError):
    """The rows of a captions file are not those that were written."""


def bytes_of(texts: pa.Array) -> pa.Buffer:
    """All texts of an array, one after another, without a copy."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[[texts.offset, texts.offset + len(texts)]]
    return data.slice(int(bounds[0]), int(bounds[1] - bounds[0])) if data else pa.py_buffer(b"")


def digest_rows(
    ids: Int64Array,
    files: pa.Array,
    widths: Int32Array,
    heights: Int32Array,
    captions: pa.Array,
    *others: Int32Array | pa.Array,
) -> pa.Buffer:
    """A line a row with tabs between its values: what the digest of `captions.arrow` is the sha256 of.

    `others`: the columns of GROUP_FIELDS or TEXT_FIELDS, for a file that has them.
    """
    numbers = [pa.array(column).cast(pa.string()) for column in (ids, widths, heights)]
    return bytes_of(
        pc.binary_join_element_wise(
            pc.binary_join_element_wise(
                numbers[0], files, *numbers[1:], captions, *(pa.array(each).cast(pa.string()) for each in others), "\t"
            ),
            "\n",
            "",
        )
    )


def begin_digest(about: Mapping[str, Any]) -> Any:
    """The sha256 of no rows; what the subsets are, or the shares of texts, belongs to the rows."""
    before = about.get("subsets") or about.get("text")
    return hashlib.sha256(json.dumps(before, sort_keys=True, ensure_ascii=False).encode() if before else b"")


class ColumnsWriter:
    """Writes `captions.arrow` into an open binary file; the schema's metadata gets the digest of all rows.

    The digest is the sha256 of `digest_rows`, the same for the same rows however they came in pieces.
    With `subsets` the file is of format 2, with `text_shares` of format 3, otherwise of format 1.
    """

    def __init__(
        self,
        stream: IO[bytes],
        about: Mapping[str, Any],
        subsets: Sequence[Subset] = (),
        text_shares: Mapping[str, float] | None = None,
    ) -> None:
        self._stream = stream
        self._finished = False
        if subsets:
            about = {**about, "format": SUBSETS_FORMAT, "subsets": [asdict(each) for each in subsets]}
        if text_shares:
            about = {**about, "format": FORMAT, "text": dict(text_shares)}
        self._digest = begin_digest(about)
        self._schema = pa.schema((*FIELDS, *(GROUP_FIELDS if subsets else TEXT_FIELDS if text_shares else ())))
        metadata = write_notes({"digest": NO_DIGEST, **about})
        self._writer = pa.ipc.new_file(stream, self._schema.with_metadata(metadata))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Write what comes after the last row; the file can be read from then on."""
        if not self._finished:
            self._finished = True
            self._writer.close()
            self._write_digest()
            self._stream.flush()

    def write(
        self,
        ids: Int64Array,
        files: pa.Array,
        widths: Int32Array,
        heights: Int32Array,
        captions: pa.Array,
        *others: Int32Array | pa.Array,
    ) -> None:
        """Append rows, by ascending id; `others`: the columns of GROUP_FIELDS or TEXT_FIELDS, for a file with them."""
        if not len(ids):
            return
        self._digest.update(digest_rows(ids, files, widths, heights, captions, *others))
        columns = [pa.array(ids), files, pa.array(widths), pa.array(heights), captions.cast(pa.large_string())]
        columns += (
            pa.array(each).cast(field.type)
            for each, field in zip(others, list(self._schema)[len(FIELDS) :], strict=True)
        )
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    @property
    def digest(self) -> str:
        """Of the rows so far."""
        return str(self._digest.hexdigest())

    def _write_digest(self) -> None:
        """Put the digest where its place was kept: in the schema at the head and in the footer."""
        self._stream.flush()
        end = self._stream.seek(-FILE_END_BYTES, 2)
        footer = end - int.from_bytes(self._stream.read(FILE_END_BYTES)[:4], "little")
        for start, length in ((0, HEAD_BYTES), (footer, -1)):
            self._stream.seek(start)
            place = self._stream.read(length).find(NO_DIGEST.encode())
            self._stream.seek(start + place)
            self._stream.write(self.digest.encode())
        self._stream.seek(0, 2)


def check_columns(path: Path) -> None:
    """Read all rows and raise DamagedCaptions unless they are those that were written.

    By the digest over the rows, 4 s for 5.2 million; a file that records none is only read.
    """
    digest, recorded = None, ""
    with refusing(
        DamagedCaptions,
        f"{path}: damaged:",
        "Make it again with `kwrap caption`: the same rows have the same digest.",
        pa.ArrowException,
    ):
        for batch in read_batches(path):
            if digest is None:
                about = read_notes(batch.schema)
                refuse_newer(path, about)
                recorded, digest = str(about.get("digest", "")), begin_digest(about)
            batch.validate(full=True)
            ids, files, widths, heights, captions = (batch.column(each.name) for each in FIELDS)
            others = [batch.column(name) for name in batch.schema.names[len(FIELDS) :]]
            digest.update(digest_rows(ids, files, widths, heights, captions.cast(pa.string()), *others))
        if digest and recorded and recorded != digest.hexdigest():
            raise ValueError(f"its rows have the digest {digest.hexdigest()[:12]}…, not {recorded[:12]}…")
