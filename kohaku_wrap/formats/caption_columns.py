"""captions.arrow for who trains from it: numbers in memory, texts left on disk and read where they are wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.formats.caption_rows import (
    find_captions,
    map_captions,
    reading_captions,
    refuse_newer,
)
from kohaku_wrap.formats.schema_notes import read_notes


@dataclass(frozen=True)
class TextColumn:
    """A column of texts read from the file a row at a time.

    The texts stay in the page cache. Mapped instead, every process would soon count the whole file as its own,
    since the kernel maps large pieces around each page that is touched.
    """

    stream: BinaryIO
    """The open file; shared with forked loader workers, since reads name their place."""

    chunk_rows: Int64Array
    """(chunks + 1,) the first row of each record batch, and the number of rows."""

    chunk_places: Int64Array
    """(chunks,) where in the file the texts of each record batch begin."""

    offsets: tuple[npt.NDArray[np.integer[Any]], ...]
    """For each record batch (rows + 1,): where its texts begin, counted from the first."""

    @classmethod
    def locate(cls, column: Any, stream: BinaryIO, mapping_address: int) -> TextColumn:
        """Of a pyarrow ChunkedArray of string or large_string whose buffers lie in a mapping of `stream`."""
        places, offsets = [], []
        for chunk in column.chunks:
            _, ends, texts = chunk.buffers()
            width = np.dtype(np.int64 if pa.types.is_large_string(chunk.type) else np.int32)
            places.append(texts.address - mapping_address if texts else 0)
            offsets.append(np.frombuffer(ends, width, len(chunk) + 1, chunk.offset * width.itemsize).copy())
        rows = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        return cls(stream, rows.astype(np.int64), np.array(places, dtype=np.int64), tuple(offsets))

    def __getitem__(self, row: int) -> str:
        chunk = int(np.searchsorted(self.chunk_rows, row, side="right")) - 1
        begin, end = self.offsets[chunk][row - self.chunk_rows[chunk] :][:2].tolist()
        return os.pread(self.stream.fileno(), end - begin, int(self.chunk_places[chunk]) + begin).decode()

    def read(self, first: int, last: int) -> Any:
        """(last - first,) the texts of some rows as one pyarrow array of large_string."""
        pieces = []
        for chunk, begin in enumerate(self.chunk_rows[:-1].tolist()):
            start, stop = max(first, begin) - begin, min(last, int(self.chunk_rows[chunk + 1])) - begin
            if start < stop:
                ends = self.offsets[chunk][start : stop + 1].astype(np.int64)
                place = int(self.chunk_places[chunk]) + int(ends[0])
                texts = os.pread(self.stream.fileno(), int(ends[-1] - ends[0]), place)
                buffers = [None, pa.py_buffer(ends - ends[0]), pa.py_buffer(texts)]
                pieces.append(pa.Array.from_buffers(pa.large_string(), stop - start, buffers))
        return pa.concat_arrays(pieces)


@dataclass(frozen=True)
class Columns:
    """The captions file: numbers in memory that forked loader workers share, texts left on disk."""

    folder: Path
    """The image folder that the file names are relative to."""

    ids: Int64Array
    """(images,) post ids, ascending."""

    widths: Int32Array
    """(images,) real widths in pixels."""

    heights: Int32Array
    """(images,) real heights in pixels."""

    files: TextColumn
    """Names relative to `folder`."""

    captions: TextColumn
    """Caption texts."""

    digest: str
    """The digest over all rows that `kwrap caption` recorded."""

    subsets: Int32Array
    """(images,) the place of each image's subset."""

    texts: TextColumn | None
    """Natural-language captions; None in a file without them."""

    text_places: Int32Array
    """(images,) the bytes of each caption before the place of its text; empty in a file without texts."""

    text_shares: Mapping[str, float]
    """How many images are trained with tags, text or both; empty in a file without texts."""

    @classmethod
    def open(cls, folder: Path, digest: str = "") -> Columns:
        """Read the captions of an image folder, see `find_captions`; nothing that is kept points into a mapping.

        Raises NoImages, NewerCaptions.
        """
        path = find_captions(folder, digest)
        mapped = map_captions(path)
        with reading_captions(path):
            table = pa.ipc.open_file(pa.BufferReader(mapped)).read_all()
            refuse_newer(path, read_notes(table.schema))
            stream = path.open("rb")
            has_texts = "text" in table.column_names
            return cls(
                folder=folder,
                ids=np.array(table["id"]),
                widths=np.array(table["width"]),
                heights=np.array(table["height"]),
                files=TextColumn.locate(table["file"], stream, mapped.address),
                captions=TextColumn.locate(table["caption"], stream, mapped.address),
                digest=str(read_notes(table.schema).get("digest", "")),
                subsets=subset_column(table),
                texts=TextColumn.locate(table["text"], stream, mapped.address) if has_texts else None,
                text_places=np.array(table["text_at"] if has_texts else (), dtype=np.int32),
                text_shares=read_notes(table.schema).get("text", {}),
            )

    def __len__(self) -> int:
        return len(self.ids)

    def path_of(self, row: int) -> Path:
        return self.folder / self.files[row]

    def caption_of(self, row: int) -> str:
        return self.captions[row]

    def size_of(self, row: int) -> tuple[int, int]:
        """Width and height in pixels."""
        return int(self.widths[row]), int(self.heights[row])


def subset_column(table: Any) -> Int32Array:
    """(images,) the place of each image's subset; of a file without that column all are of the first."""
    return np.array(table["subset"]) if "subset" in table.column_names else np.zeros(len(table), dtype=np.int32)
