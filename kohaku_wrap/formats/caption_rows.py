"""captions.arrow, the images of a folder with their sizes and captions: its columns, what it says of itself, rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import BoolArray, Int64Array
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import open_regular
from kohaku_wrap.formats.schema_notes import read_notes

CAPTIONS_FILE = "captions.arrow"
"""The images and captions of a folder, written by `kwrap caption` and `kwrap import`."""

OWN_STYLE = "own"
"""What the schema of imported captions says of their style."""

DIGITS_OF_KEPT = 16
"""Of the digest, in the name of a captions file that an import replaced and runs may still need."""

FORMAT = 3
"""Of files with texts; 2 of those with subsets. Without the entry it is 1: one subset, each image once an epoch."""

SUBSETS_FORMAT = 2


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


@dataclass(frozen=True)
class ImageSizes:
    """Widths and heights of the images to train on."""

    widths: Int64Array
    """(images,) pixels."""

    heights: Int64Array
    """(images,) pixels."""

    source: str
    """Where they come from, in words."""

    exact: bool = True
    """Whether they were measured on the images themselves."""

    caption_bytes: int | None = None
    """Bytes of all captions, where known."""

    repeats: Int64Array | int = 1
    """How often an epoch trains each image, before the template's num_repeats; (images,) where they differ."""

    measured: BoolArray | None = None
    """(images,) whether the loss of each is measured and none of it trained; None where none is held out."""


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
        refuse_newer(path, read_notes(reader.schema))
        return reader


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
    return read_notes(open_captions(images, digest).schema)


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
