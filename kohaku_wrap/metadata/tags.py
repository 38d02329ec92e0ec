"""The tag table as arrays, and the way from a tag's id to its row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int8Array, Int32Array, Int64Array
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.places import NOWHERE, place_finder
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.tag_table import read_tag_types
from kohaku_wrap.metadata.words import read_words

NO_TAG = NOWHERE
"""What `TagTable.rows_of` answers for an id that no tag has."""


class UnknownTags(KwrapError):
    """Tags that a dataset names and the database does not have."""


@dataclass(frozen=True)
class TagTable:
    """All tags of a database, by ascending id."""

    ids: Int64Array
    """(tags,) ascending."""

    names: tuple[str, ...]
    """(tags,) as the site writes them, with underscores."""

    types: Int8Array
    """(tags,) 0 … 4 as in TAG_TYPES, -1 where the database says something else."""

    popularity: Int64Array
    """(tags,) how many posts have the tag, by the database's own count; 0 where that is unknown."""

    pieces: Sequence[Callable[[], TagChunk]] | None = None
    """The tags of wanted posts, where they were read together with the table; each can be read once."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def rows_of(self) -> Callable[[Int64Array], Int32Array]:
        """From ids to the row of each, NO_TAG where no tag has it."""
        return place_finder(self.ids)

    @cached_property
    def row_of_name(self) -> dict[str, int]:
        """From a name to its row."""
        return {name: row for row, name in enumerate(self.names)}

    def find_names(self, names: Iterable[str], wanted_by: str) -> Int64Array:
        """The ids of tags given by name. Raises UnknownTags, each unknown one with the nearest that exist."""
        names = list(names)
        unknown = [name for name in names if name not in self.row_of_name]
        if unknown:
            described = [f"{name!r}{self._suggest(name)}" for name in unknown]
            raise UnknownTags(
                f"{wanted_by}: the database has no tag {', '.join(described)}",
                "Tags are written as the site writes them, with underscores. Fix the name or take it out.",
            )
        return self.ids[[self.row_of_name[name] for name in names]] if names else np.empty(0, dtype=np.int64)

    def _suggest(self, name: str) -> str:
        written = name.strip().lower().replace(" ", "_")
        near = (
            [written]
            if written in self.row_of_name
            else difflib.get_close_matches(
                written, [known for known in self.names if known[:1] == written[:1]], n=1, cutoff=0.8
            )
        )
        return f" (did you mean {near[0]!r}?)" if near else ""


def read_tags(source: Source, post_ids: Int64Array | None = None, folder: Path | None = None) -> TagTable:
    """Every tag: of the tag table, or where there is none of the posts' own columns, with its number of posts.

    With `post_ids` (ascending) such columns need not be read again for the tags of these posts, which are kept in
    files in `folder` until `map_tag_chunks` takes them.
    """
    if not source.edition.has_tag_strings:
        return _read_table(source)
    edition = source.edition
    wanted = np.empty(0, dtype=np.int64) if post_ids is None else post_ids
    names, types, uses, pieces = read_words(source, wanted, folder)
    if edition.tag_table:
        known = read_tag_types(edition.tag_table, edition.categories)
        types = np.where(types == -1, np.array([known.get(name, -1) for name in names], dtype=np.int8), types)
    return TagTable(np.arange(len(names)), names, types, uses, None if post_ids is None else pieces)


def _read_table(source: Source) -> TagTable:
    dialect = source.dialect("tag")
    tag_id, kind, popularity = (dialect.number(column) for column in ("id", "type", "popularity"))
    batches = list(
        source.scan(
            f"SELECT {tag_id} AS id, {dialect.text('name')} AS name, "
            f"CASE WHEN ({kind}) IN (0, 1, 2, 3, 4) THEN ({kind}) ELSE -1 END AS type, "
            f"coalesce({popularity}, 0) AS popularity FROM tag WHERE ({tag_id}) IS NOT NULL ORDER BY tag.id"
        )
    )
    if not batches or not sum(batch.num_rows for batch in batches):
        none = np.empty(0, dtype=np.int64)
        return TagTable(none, (), none.astype(np.int8), none)
    table = pa.Table.from_batches(batches)
    ids = table.column(0).to_numpy()
    if (ids[1:] < ids[:-1]).any():
        # Ids that are texts come in the order of texts.
        table = table.take(pa.array(np.argsort(ids, kind="stable")))
    return TagTable(
        ids=table.column(0).to_numpy().astype(np.int64),
        names=tuple(table.column(1).to_pylist()),
        types=table.column(2).to_numpy().astype(np.int8),
        popularity=table.column(3).to_numpy().astype(np.int64),
    )
