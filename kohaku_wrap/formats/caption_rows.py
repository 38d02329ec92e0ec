"""captions.arrow, the images of a folder with their sizes and captions: its format, its digest, its readers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import open_regular

CAPTIONS_FILE = "captions.arrow"
"""The images and captions of a folder, written by `kwrap caption` and `kwrap import`."""

OWN_STYLE = "own"
"""What the schema of imported captions says of their style."""

DIGITS_OF_KEPT = 16
"""Of the digest, in the name of a captions file that an import replaced and runs may still need."""

FORMAT = 3
"""Of files with texts; 2 of those with subsets. Without the entry it is 1: one subset, each image once an epoch."""

SUBSETS_FORMAT = 2

METADATA_KEY = b"kwrap"
NO_DIGEST = "0" * 64
"""Stands in the file until all rows are written; the digest has the same length and takes its place."""

FILE_END_BYTES = 10
"""Of an Arrow file, behind its footer: the footer's length and six letters."""

HEAD_BYTES = 1 << 16
"""Of a captions file, within which the digest stands: it comes first in the schema's metadata."""

FIELDS = (
    pa.field("id", pa.int64(), nullable=False),
    pa.field("file", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("caption", pa.large_string(), nullable=False),
)
GROUP_FIELDS = (
    pa.field("repeats", pa.int32(), nullable=False),
    pa.field("subset", pa.int32(), nullable=False),
)
"""From format 2 on: how often an epoch trains the image, and the place of its subset in the schema's list."""

TEXT_FIELDS = (
    pa.field("text", pa.large_string(), nullable=False),
    pa.field("text_at", pa.int32(), nullable=False),
)
"""From format 3 on: a natural-language caption, empty for none, and the bytes of `caption` before its place."""

Int32Array = npt.NDArray[np.int32]


class NoImages(KwrapError):
    """There is nothing to count: no images, or no file that lists them."""


class NewerCaptions(KwrapError):
    """The captions file is of a later kwrap."""


@dataclass(frozen=True)
class Subset:
    """Images that are trained alike."""

    name: str
    """Also its folder's below the image folder."""

    repeats: int = 1
    """How often an epoch trains each of its images, before the template's num_repeats."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Dataset options of its own, over the template's."""


class DamagedCaptions(KwrapError):
    """The rows of a captions file are not those that were written."""


@dataclass(frozen=True)
class ImageSizes:
    """Widths and heights of the images to train on."""

    widths: npt.NDArray[np.int64]
    """(images,) pixels."""

    heights: npt.NDArray[np.int64]
    """(images,) pixels."""

    source: str
    """Where they come from, in words."""

    exact: bool = True
    """Whether they were measured on the images themselves."""

    caption_bytes: int | None = None
    """Bytes of all captions, where known."""

    repeats: npt.NDArray[np.int64] | int = 1
    """How often an epoch trains each image, before the template's num_repeats; (images,) where they differ."""

    measured: npt.NDArray[np.bool_] | None = None
    """(images,) whether the loss of each is measured and none of it trained; None where none is held out."""


def bytes_of(texts: pa.Array) -> pa.Buffer:
    """All texts of an array, one after another, without a copy."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[[texts.offset, texts.offset + len(texts)]]
    return data.slice(int(bounds[0]), int(bounds[1] - bounds[0])) if data else pa.py_buffer(b"")


def digest_rows(
    ids: npt.NDArray[np.int64],
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


def find_captions(images: Path, digest: str = "") -> Path:
    """The folder's captions file: that of the rows with `digest`, where later imports kept it, else the newest."""
    kept = images / f"captions-{digest[:DIGITS_OF_KEPT]}.arrow"
    return kept if digest and kept.is_file() else images / CAPTIONS_FILE


def map_captions(path: Path) -> Any:
    """A pyarrow buffer that maps a captions file. Raises NoImages."""
    with reading_captions(path):
        if not path.exists():
            raise NoImages(
                f"{path}: not there, so the images' sizes are not known",
                "Run `kwrap extract` and `kwrap caption` first, or `kwrap import FOLDER` for images of your own; or "
                "count with `kwrap plan --selection SEL.parquet`.",
            )
        open_regular(path).close()
        return pa.memory_map(str(path)).read_buffer()


def reading_captions(path: Path) -> AbstractContextManager[None]:
    """Refuse, as NoImages, what `kwrap caption` did not write."""
    return refusing(NoImages, f"{path}: not a captions file", "Run `kwrap caption` again.", pa.ArrowException)


def open_captions(images: Path, digest: str = "") -> Any:
    """The memory-mapped reader of the folder's captions, see `find_captions`. Raises NoImages, NewerCaptions."""
    path = find_captions(images, digest)
    mapped = map_captions(path)
    with reading_captions(path):
        reader = pa.ipc.open_file(pa.BufferReader(mapped))
        refuse_newer(path, read_about(reader.schema))
        return reader


def read_about(schema: Any) -> dict[str, Any]:
    """What `kwrap caption` wrote about the rows into their schema: digest, count, dataset, style, selection."""
    return dict(json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")))


def refuse_newer(path: Path, about: Mapping[str, Any]) -> None:
    """Raise NewerCaptions for a file whose rows may mean something else."""
    if about.get("format", 1) > FORMAT:
        raise NewerCaptions(
            f"{path}: format {about['format']}, and this kwrap reads up to {FORMAT}", "Update kwrap, or make it again."
        )


def read_subsets(images: Path) -> list[Subset]:
    """The subsets of an imported folder; none where it is one without options, or there are no captions yet."""
    with suppress(NoImages):
        return [Subset(**each) for each in read_captions_metadata(images).get("subsets", ())]
    return []


def read_captions_metadata(images: Path, digest: str = "") -> dict[str, Any]:
    """What was written about the folder's captions, see `find_captions`. Raises NoImages."""
    return read_about(open_captions(images, digest).schema)


def read_folder_sizes(images: Path) -> ImageSizes:
    """The measured sizes of the images that extract and caption made ready. Raises NoImages."""
    with reading_captions(images / CAPTIONS_FILE):
        table = open_captions(images).read_all()
        if not len(table):
            raise NoImages(
                f"{images / CAPTIONS_FILE}: lists no image", "Run `kwrap extract` and `kwrap caption` again."
            )
        captions = [table[name] for name in ("caption", "text") if name in table.column_names]
        return ImageSizes(
            widths=table["width"].to_numpy().astype(np.int64),
            heights=table["height"].to_numpy().astype(np.int64),
            source=f"the images in {images}",
            caption_bytes=sum(chunk.nbytes for column in captions for chunk in column.chunks),
            repeats=table["repeats"].to_numpy().astype(np.int64) if "repeats" in table.column_names else 1,
        )


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

    subsets: npt.NDArray[np.int32]
    """(images,) the place of each image's subset."""

    texts: TextColumn | None
    """Natural-language captions; None in a file without them."""

    text_places: npt.NDArray[np.int32]
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
            refuse_newer(path, read_about(table.schema))
            stream = path.open("rb")
            has_texts = "text" in table.column_names
            return cls(
                folder=folder,
                ids=np.array(table["id"]),
                widths=np.array(table["width"]),
                heights=np.array(table["height"]),
                files=TextColumn.locate(table["file"], stream, mapped.address),
                captions=TextColumn.locate(table["caption"], stream, mapped.address),
                digest=str(read_about(table.schema).get("digest", "")),
                subsets=subset_column(table),
                texts=TextColumn.locate(table["text"], stream, mapped.address) if has_texts else None,
                text_places=np.array(table["text_at"] if has_texts else (), dtype=np.int32),
                text_shares=read_about(table.schema).get("text", {}),
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
        metadata = {METADATA_KEY: json.dumps({"digest": NO_DIGEST, **about}).encode()}
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
        ids: npt.NDArray[np.int64],
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


def read_batches(path: Path, *names: str) -> Iterator[Any]:
    """The record batches of a captions file, one at a time, with the columns `names` alone where some are given.

    Read and not mapped: mapped, the whole file would count as memory of this process.
    """
    open_regular(path).close()
    with pa.OSFile(str(path)) as source:
        reader = pa.ipc.open_file(source)
        if names:
            places = [number for number, name in enumerate(reader.schema.names) if name in names]
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=places))
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


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
                about = read_about(batch.schema)
                refuse_newer(path, about)
                recorded, digest = str(about.get("digest", "")), begin_digest(about)
            batch.validate(full=True)
            ids, files, widths, heights, captions = (batch.column(each.name) for each in FIELDS)
            others = [batch.column(name) for name in batch.schema.names[len(FIELDS) :]]
            digest.update(digest_rows(ids, files, widths, heights, captions.cast(pa.string()), *others))
        if digest and recorded and recorded != digest.hexdigest():
            raise ValueError(f"its rows have the digest {digest.hexdigest()[:12]}…, not {recorded[:12]}…")
