"""The captions file opened for training: numbers in memory, texts read from their places."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.errors import KwrapError

CAPTIONS_FILE = "captions.arrow"
"""What `kwrap caption` writes into the image folder."""


class BadCaptions(KwrapError):
    """The captions file is missing, or is not what `kwrap caption` writes."""


@dataclass(frozen=True)
class TextColumn:
    """A column of texts read from the file a row at a time.

    The texts stay in the page cache. Mapped instead, every process would soon count the whole file as its own,
    since the kernel maps large pieces around each page that is touched.
    """

    stream: BinaryIO
    """The open file; shared with forked loader workers, since reads name their place."""

    chunk_rows: npt.NDArray[np.int64]
    """(chunks + 1,) the first row of each record batch, and the number of rows."""

    chunk_places: npt.NDArray[np.int64]
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


@dataclass(frozen=True)
class Columns:
    """The captions file: numbers in memory that forked loader workers share, texts left on disk."""

    folder: Path
    """The image folder that the file names are relative to."""

    ids: npt.NDArray[np.int64]
    """(images,) post ids, ascending."""

    widths: npt.NDArray[np.int32]
    """(images,) real widths in pixels."""

    heights: npt.NDArray[np.int32]
    """(images,) real heights in pixels."""

    files: TextColumn
    """Names relative to `folder`."""

    captions: TextColumn
    """Caption texts."""

    digest: str
    """The digest over all rows that `kwrap caption` recorded."""

    @classmethod
    def open(cls, folder: Path) -> Columns:
        """Read `captions.arrow` of an image folder. Raises BadCaptions."""
        path = Path(folder) / CAPTIONS_FILE
        try:
            stream = path.open("rb")
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return cls.locate(Path(folder), stream, pa.py_buffer(mapping))
        except FileNotFoundError:
            raise BadCaptions(f"{path}: no such file", "Make it with `kwrap caption`.") from None
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise BadCaptions(
                f"{path}: not a captions file ({error})", "Make it again with `kwrap caption`."
            ) from error

    @classmethod
    def locate(cls, folder: Path, stream: BinaryIO, mapped: Any) -> Columns:
        """From an Arrow buffer that maps `stream`; nothing that is kept points into it."""
        table = pa.ipc.open_file(pa.BufferReader(mapped)).read_all()
        about = json.loads((table.schema.metadata or {}).get(b"kwrap", b"{}"))
        return cls(
            folder=folder,
            ids=np.array(table["id"]),
            widths=np.array(table["width"]),
            heights=np.array(table["height"]),
            files=TextColumn.locate(table["file"], stream, mapped.address),
            captions=TextColumn.locate(table["caption"], stream, mapped.address),
            digest=str(about.get("digest", "")),
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
