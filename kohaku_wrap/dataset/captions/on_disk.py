"""Which selected posts have a verified image on disk, its real size, and which captions lie there already."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import BoolArray, Int32Array, Int64Array
from kohaku_wrap.dataset.images.extracted import EXTRACTED_FILE, ExtractedUnreadable, read_extracted
from kohaku_wrap.metadata.places import NOWHERE, find_places


@dataclass(frozen=True)
class CaptionImages:
    """The images of a selection in one folder, by ascending post id."""

    places: Int64Array
    """(images,) index of each image's post among the selected ones."""

    ids: Int64Array
    """(images,) post ids."""

    files: pa.Array
    """(images,) NNNN/ID.ext below the folder."""

    widths: Int32Array
    """(images,) real width in pixels."""

    heights: Int32Array
    """(images,) real height in pixels."""

    has_text: BoolArray
    """(images,) whether a .txt lies beside the image."""

    vanished: int
    """Images that extract wrote and that are no longer there."""

    def __len__(self) -> int:
        return len(self.ids)

    def slice_of(self, first_place: int, stop_place: int) -> slice:
        """The images of the selected posts from `first_place` to before `stop_place`."""
        return slice(int(np.searchsorted(self.places, first_place)), int(np.searchsorted(self.places, stop_place)))


def find_images(folder: Path, post_ids: Int64Array) -> CaptionImages | None:
    """The images of the posts `post_ids` (ascending) that extract verified and that are still in `folder`.

    None when nothing was extracted there yet. Raises ExtractedUnreadable.
    """
    path = folder / EXTRACTED_FILE
    if not path.is_file():
        return None
    table = read_extracted(folder, ("id", "file", "width", "height"))
    ids = table.column("id").to_numpy()
    if (ids[1:] <= ids[:-1]).any():
        raise ExtractedUnreadable(f"{path}: not by ascending id", "Run `kwrap extract` again.")
    places = find_places(post_ids, ids)
    wanted = np.flatnonzero(places != NOWHERE)
    files = table.column("file").combine_chunks().take(pa.array(wanted))
    on_disk, has_text = look_on_disk(folder, files, ids[wanted])
    there = np.flatnonzero(on_disk)
    kept = wanted[there]
    return CaptionImages(
        places=places[kept],
        ids=ids[kept],
        files=files.take(pa.array(there)),
        widths=table.column("width").to_numpy()[kept],
        heights=table.column("height").to_numpy()[kept],
        has_text=has_text[there],
        vanished=len(wanted) - len(kept),
    )


def look_on_disk(folder: Path, files: pa.Array, ids: Int64Array) -> tuple[BoolArray, BoolArray]:
    """Whether each file of `files` is in `folder`, and whether a .txt is beside it; each shard is listed once."""
    on_disk = np.zeros(len(files), dtype=bool)
    has_text = np.zeros(len(files), dtype=bool)
    shards = pc.replace_substring_regex(files, "/[^/]*$", "").dictionary_encode()
    codes = shards.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(shards.dictionary) + 1))
    for number, shard in enumerate(shards.dictionary.to_pylist()):
        rows = order[bounds[number] : bounds[number + 1]]
        names: set[str] = set()
        with suppress(FileNotFoundError), os.scandir(folder / shard) as entries:
            names = {entry.name for entry in entries}
        skip = len(shard) + 1
        on_disk[rows] = [name[skip:] in names for name in files.take(pa.array(rows)).to_pylist()]
        has_text[rows] = [f"{post_id}.txt" in names for post_id in ids[rows].tolist()]
    return on_disk, has_text
