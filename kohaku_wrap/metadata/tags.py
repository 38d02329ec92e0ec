"""The tag table as arrays, and the way from a tag's id to its row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.metadata.columns import TAG_TYPES
from kohaku_wrap.metadata.parallel import map_in_order, usable_threads
from kohaku_wrap.metadata.places import NOWHERE, place_finder
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.strings import count_tags
from kohaku_wrap.metadata.tag_table import read_tag_types

NO_TAG = NOWHERE
"""What `TagTable.rows_of` answers for an id that no tag has."""


class UnknownTags(KwrapError):
    """Tags that a dataset names and the database does not have."""


@dataclass(frozen=True)
class TagTable:
    """All tags of a database, by ascending id."""

    ids: npt.NDArray[np.int64]
    """(tags,) ascending."""

    names: tuple[str, ...]
    """(tags,) as the site writes them, with underscores."""

    types: npt.NDArray[np.int8]
    """(tags,) 0 … 4 as in TAG_TYPES, -1 where the database says something else."""

    popularity: npt.NDArray[np.int64]
    """(tags,) how many posts have the tag, by the database's own count; 0 where that is unknown."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def rows_of(self) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]]:
        """From ids to the row of each, NO_TAG where no tag has it."""
        return place_finder(self.ids)

    @cached_property
    def row_of_name(self) -> dict[str, int]:
        """From a name to its row."""
        return {name: row for row, name in enumerate(self.names)}

    def find_names(self, names: Iterable[str], wanted_by: str) -> npt.NDArray[np.int64]:
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


def read_tags(source: Source) -> TagTable:
    """Every tag: of the tag table, or where there is none of the posts' own columns, with its number of posts."""
    return _count_all(source) if source.edition.has_tag_strings else _read_table(source)


def _count_all(source: Source) -> TagTable:
    """The tags of all posts; a tag's type is that of the columns in which it stands most often."""
    edition = source.edition
    kinds = list(edition.typed)
    columns = [f"tags_{kind}" for kind in kinds]
    if len(kinds) < len(TAG_TYPES):
        columns.append("tags")
        kinds.append(-1)
    uses: dict[str, dict[int, int]] = {}
    batches = source.scan(f"SELECT {', '.join(columns)} FROM ({edition.posts}) AS post")
    for counted in map_in_order(lambda batch: list(map(count_tags, batch.columns)), batches, usable_threads()):
        for kind, (found, counts) in zip(kinds, counted, strict=True):
            for name, count in zip(found, counts, strict=True):
                some = uses.setdefault(name, {})
                some[kind] = some.get(kind, 0) + count
    names = tuple(sorted(uses))
    known = read_tag_types(edition.tag_table, edition.categories) if edition.tag_table else {}
    types, popularity = [], []
    for name in names:
        some = uses[name]
        typed = [(-count, kind) for kind, count in some.items() if kind >= 0]
        types.append(min(typed)[1] if typed else known.get(name, -1))
        popularity.append(some.get(-1) or sum(some.values()))
    return TagTable(
        np.arange(len(names), dtype=np.int64), names, np.array(types, np.int8), np.array(popularity, np.int64)
    )


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
