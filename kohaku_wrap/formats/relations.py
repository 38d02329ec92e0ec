"""`relations.parquet` of an image folder: each post's parent and its picture's md5, written by `kwrap caption`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import atomic_write
from kohaku_wrap.formats.schema_notes import read_notes, write_notes

RELATIONS_FILE = "relations.parquet"
FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("parent", pa.int64()),
        pa.field("content", pa.string(), nullable=False),
    ]
)


class BadRelations(KwrapError):
    """The file is not what `kwrap caption` writes."""


@dataclass(frozen=True)
class Relations:
    """Which posts belong together."""

    ids: Int64Array
    """(posts,) ascending."""

    parents: Int64Array
    """(posts,) the id of each post's parent, 0 for none, -1 where that is not known."""

    contents: pa.Array
    """(posts,) a digest of each picture, '' where that is not known."""


def write_relations(images: Path, relations: Relations) -> None:
    """Write the file whole or not at all; the same one is left alone."""
    with suppress(BadRelations):
        before = read_relations(images)
        if before is not None and is_same(before, relations):
            return
    parents = pa.array(relations.parents, mask=relations.parents < 0)
    table = pa.Table.from_arrays(
        [pa.array(relations.ids), parents, relations.contents.cast(pa.string())], schema=SCHEMA
    )
    with atomic_write(images / RELATIONS_FILE, "wb") as stream:
        pq.write_table(table.replace_schema_metadata(write_notes({"format": FORMAT})), stream, compression="zstd")


def is_same(one: Relations, other: Relations) -> bool:
    """Whether two say the same."""
    numbers = ((one.ids, other.ids), (one.parents, other.parents))
    return all(np.array_equal(*pair) for pair in numbers) and bool(one.contents.equals(other.contents))


def read_relations(images: Path) -> Relations | None:
    """The relations of a folder; None where nobody wrote any. Raises BadRelations."""
    path = images / RELATIONS_FILE
    if not path.is_file():
        return None
    with refusing(
        BadRelations,
        f"{path}: cannot be read",
        "Run `kwrap caption` again: it writes the file anew.",
        pa.ArrowException,
    ):
        table = pq.read_table(path)
        about = read_notes(table.schema)
        if about.get("format") != FORMAT:
            raise ValueError(f"format {about.get('format')}, and this kwrap reads {FORMAT}")
        parents = table["parent"].fill_null(-1).to_numpy()
        return Relations(table["id"].to_numpy(), parents, table["content"].combine_chunks())
