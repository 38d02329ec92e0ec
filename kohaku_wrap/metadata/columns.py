"""Which columns of a table of posts say what, recognised by their names or given by a dataset's `[metadata]`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.toml_files import TableReader

TAG_TYPES = ("general", "artist", "character", "copyright", "meta")
"""Names of `tag.type` 0 … 4."""

SITE_ZONE = "America/New_York"
"""Danbooru's own, in which dates without an offset are read."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "post_id", "__index_level_0__"),
    "created_at": ("created_at", "created", "date"),
    "md5": ("md5", "hash", "file.md5", "media_asset.md5"),
    "file_url": ("file_url", "file.url", "url"),
    "file_ext": ("file_ext", "ext", "extension", "file_extension", "file.ext", "media_asset.file_ext"),
    "rating": ("rating",),
    "score": ("score", "score.total"),
    "fav_count": ("fav_count", "favorites", "favorite_count", "num_favs"),
    "image_width": ("image_width", "width", "file.width", "media_asset.image_width"),
    "image_height": ("image_height", "height", "file.height", "media_asset.image_height"),
    "is_deleted": ("is_deleted", "flags.deleted"),
    "is_banned": ("is_banned",),
    "parent_id": ("parent_id", "parent", "relationships.parent_id"),
}
"""Names under which sites and dumps publish what kwrap reads, the first that is there; a dot leads into a structure."""

FILE_NAMES = ("file_name", "filename", "image", "file_url", "file.url")
"""Columns whose end is the extension where no column has it by itself."""

TAG_NAMES: Mapping[str, tuple[str, ...]] = {
    "tags": ("tag_string", "tags"),
    **{
        kind: (f"tag_string_{kind}", f"tags_{kind}", f"tags.{kind}", f"{kind}_tags", kind)
        for kind in (*TAG_TYPES, "metadata")
    },
}
"""Likewise for tags: all of a post in one column, or those of one category."""

WORDS_OF_RATINGS = {**{name: number for number, name in enumerate(RATINGS)}, "safe": 0, "g": 0, "s": 1, "q": 2, "e": 3}
OLD_RATINGS = {"s": 0}
"""Until 2022 there were three ratings, and s was safe: so in a table that has s and no g."""

CATEGORIES = {
    **{name: number for number, name in enumerate(TAG_TYPES)},
    **{"metadata": 4, "series": 3, "0": 0, "1": 1, "3": 3, "4": 2, "5": 4},
}
"""Types of tags by what the sites' own tables call them."""


@dataclass(frozen=True)
class SiteMapping:
    """A dataset's `[metadata]`: how another site's table is read."""

    site: str = ""
    """Shown in reports."""

    zone: str = SITE_ZONE
    """In which dates without an offset are read."""

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By what kwrap reads, the columns of the table; several are read one after another, for tags only."""

    ratings: Mapping[str, int] = field(default_factory=dict)
    """By the site's word in small letters, 0 … 3."""

    categories: Mapping[str, int] = field(default_factory=dict)
    """By the site's number or word in a table of tags, an index of TAG_TYPES."""

    tag_table: Path | None = None
    """A table that gives categories to tags that have no column of their own."""


DANBOORU = SiteMapping()
"""Names and zone of the site itself."""


def read_site_mapping(table: Mapping[str, Any], problems: list[Problem]) -> SiteMapping:
    """The `[metadata]` table; faults go to `problems`."""
    reader = TableReader("metadata", table, ("site", "zone", "columns", "ratings", "categories"), problems)
    zone = reader.text("zone", SITE_ZONE)
    if zone != SITE_ZONE and zone not in available_timezones():
        reader.fault("zone", f"{zone!r} is no time zone such as America/New_York or UTC")
        zone = SITE_ZONE
    names = [*NAMES, "tags", *TAG_TYPES]
    columns = TableReader("metadata.columns", reader.table("columns"), names, problems)
    found: dict[str, tuple[str, ...]] = {}
    for name in columns.table_values:
        if isinstance(columns.table_values[name], str):
            found[name] = (columns.text(name),) if columns.text(name) else ()
        else:
            found[name] = columns.words(name, ())
            if name in NAMES and len(found[name]) > 1:
                columns.fault(name, "names several columns, which only tags may")
    return SiteMapping(
        reader.text("site"),
        zone,
        found,
        _read_words(reader, "ratings", RATINGS),
        _read_words(reader, "categories", TAG_TYPES),
    )


def _read_words(reader: TableReader, key: str, names: Sequence[str]) -> dict[str, int]:
    """A table of what the site writes for each of `names`: words or numbers; the number of the name by each word."""
    table = TableReader(f"metadata.{key}", reader.table(key), names, reader.problems)
    found: dict[str, int] = {}
    for number, name in enumerate(names):
        words = table.table_values.get(name, [])
        if not isinstance(words, list) or not all(isinstance(one, str | int) for one in words):
            table.fault(name, f"{words!r} is not a list of words or numbers")
            continue
        for one in words:
            if found.setdefault(str(one).lower(), number) != number:
                table.fault(name, f"{one!r} stands under {names[found[str(one).lower()]]} too")
    return found


@dataclass(frozen=True)
class FoundColumns:
    """The columns of a table of posts that are read."""

    posts: Mapping[str, str]
    """By the names of NAMES; what is absent is not there."""

    whole: tuple[str, ...]
    """Columns with all tags of a post; empty where there are only those of categories."""

    typed: Mapping[int, tuple[str, ...]]
    """By index of TAG_TYPES, the columns with the tags of that category."""


def find_columns(available: Collection[str], mapping: SiteMapping, where: str) -> FoundColumns | None:
    """The columns that are read of those `available`; None where it is no table of posts, without an id or tags.

    Raises ProblemsFound for columns of the mapping that are not there.
    """
    known = {name.lower(): name for name in available}
    wanted = {key: names for key, names in mapping.columns.items() if names}
    problems = [
        Problem(f"metadata.columns.{key}", f"{where} has no column {name!r}")
        for key, names in wanted.items()
        for name in names
        if name.lower() not in known
    ]
    if problems:
        raise ProblemsFound(
            where,
            problems,
            'Name its own ones in a copy of the dataset file, or "" for what it does not have. '
            f"Its columns: {', '.join(sorted(available)[:60])}.",
        )

    def find(key: str, names: Sequence[str]) -> tuple[str, ...]:
        if key in mapping.columns:
            return tuple(known[name.lower()] for name in mapping.columns[key])
        return next(((known[name],) for name in names if name in known), ())

    posts = {key: found[0] for key, names in NAMES.items() if (found := find(key, names))}
    if "file_ext" in mapping.columns and "file_ext" in posts:
        posts["file_name"] = posts.pop("file_ext")
    elif "file_ext" not in posts and "file_ext" not in mapping.columns:
        posts |= dict([("file_name", known[name]) for name in FILE_NAMES if name in known][:1])
    typed = {
        number: found
        for number, kind in enumerate(TAG_TYPES)
        if (found := find(kind, TAG_NAMES[kind] + (TAG_NAMES["metadata"] if kind == "meta" else ())))
    }
    whole = find("tags", TAG_NAMES["tags"])
    return FoundColumns(posts, whole, typed) if "id" in posts and (whole or typed) else None
