"""captions.arrow and the caches of imported images, and what an earlier import wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int32Array
from kohaku_wrap.dataset.captions import formats
from kohaku_wrap.dataset.own.images import ImportedImage
from kohaku_wrap.files import atomic_write, link_file
from kohaku_wrap.formats.caption_rows import (
    CAPTIONS_FILE,
    DIGITS_OF_KEPT,
    OWN_STYLE,
    NoImages,
    Subset,
    open_captions,
    read_subsets,
)
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.formats.schema_notes import read_notes


def read_earlier(images: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """What an earlier import wrote about its rows, and their captions by id; empty where there was none."""
    try:
        reader = open_captions(images)
    except NoImages:
        return {}, {}
    table = reader.read_all()
    return read_notes(reader.schema), dict(zip(table["id"].to_pylist(), table["caption"].to_pylist(), strict=True))


def write_columns(
    images: Path, rows: dict[int, ImportedImage], captions: dict[int, str], new: Sequence[Subset], dataset: str
) -> str:
    """Write captions.arrow and the caches; the rows that it replaces stay for runs that began with them."""
    known = {subset.name: subset for subset in read_subsets(images)} | {subset.name: subset for subset in new}
    used = {row.subset for row in rows.values()}
    subsets = [subset for name, subset in known.items() if name in used]
    place = {subset.name: number for number, subset in enumerate(subsets)}
    ids = np.array(list(rows), dtype=np.int64)
    widths, heights = (
        np.array([getattr(row, name) for row in rows.values()], dtype=np.int32) for name in ("width", "height")
    )
    groups = np.array([place[row.subset] for row in rows.values()], dtype=np.int32)
    repeats = np.array([each.repeats for each in subsets], dtype=np.int32)[groups]
    files = pa.array([row.file for row in rows.values()], pa.string())
    texts = pa.array([captions[id] for id in rows], pa.string())
    about = {"count": len(ids), "dataset": dataset, "style": OWN_STYLE}
    before = read_earlier(images)[0].get("digest", "")
    path = images / CAPTIONS_FILE
    with atomic_write(path, "w+b") as stream:
        with ColumnsWriter(stream, about, subsets) as columns:
            columns.write(ids, files, widths, heights, texts, repeats, groups)
        if before and before != columns.digest:
            kept = images / f"captions-{before[:DIGITS_OF_KEPT]}.arrow"
            kept.unlink(missing_ok=True)
            link_file(path, kept)
    write_caches(images, subsets, files, texts, widths, heights, groups)
    return columns.digest


def write_caches(
    images: Path,
    subsets: Sequence[Subset],
    files: pa.Array,
    texts: pa.Array,
    widths: Int32Array,
    heights: Int32Array,
    groups: Int32Array,
) -> None:
    """metadata_cache.json of all images, and where there are several subsets one in the folder of each."""
    names, escaped = formats.escape_json(files), formats.escape_json(texts)
    places = [(images, np.arange(len(groups)))]
    if len(subsets) > 1:
        places += [(images / each.name, np.flatnonzero(groups == place)) for place, each in enumerate(subsets)]
    for folder, rows in places:
        taken = names.take(pa.array(rows)), escaped.take(pa.array(rows))
        entries = formats.cache_entries(formats.path_prefix(images), *taken, widths[rows], heights[rows])
        with atomic_write(folder / formats.CACHE_FILE, "wb") as stream:
            stream.write(b"{\n" + bytes(entries)[len(formats.ENTRY_SEPARATOR) :] + b"\n}\n")
