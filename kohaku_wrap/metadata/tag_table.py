"""A table of tags beside posts whose tags have no category: names and what kind of tag each is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.files import describe_absence
from kohaku_wrap.metadata.columns import TAG_TYPES
from kohaku_wrap.metadata.dialects import name_sql
from kohaku_wrap.metadata.sqlite_files import DatabaseMissing, is_sqlite, reading_tables
from kohaku_wrap.metadata.table_files import find_table_files
from kohaku_wrap.metadata.tables import explained, open_files

NAME_COLUMNS = ("name", "tag")
CATEGORY_COLUMNS = ("category", "type")
ROWS_A_FETCH = 1 << 16


def read_tag_types(path: Path, categories: Mapping[str, int]) -> dict[str, int]:
    """By the name of a tag, the index of its category in TAG_TYPES; tags of other categories are left out.

    `categories`: by what the table calls them, in small letters. A column `type` of whole numbers of which one is 2
    has danbooru2023's own: the site has no category 2. Raises ProblemsFound for a table without names or categories.
    """
    if not path.is_file() and not path.is_dir():
        advice = "Give a table of tags with --tags: name and category."
        raise DatabaseMissing(f"{path}: {describe_absence(path)}", advice)
    types: dict[str, int] = {}
    raw: dict[str, str] = {}
    column = ""
    for column, rows in _rows(path):  # noqa: B007 - all have the same
        raw |= {str(name).strip().replace(" ", "_"): _word_of(kind) for name, kind in rows}
    words = dict(categories)
    if column == "type" and "2" in raw.values():
        words |= {str(number): number for number in range(len(TAG_TYPES))}
    for name, kind in raw.items():
        number = words.get(kind)
        if number is not None:
            types[name] = number
    return types


def _word_of(kind: object) -> str:
    """A category as the words for them are written; whole numbers may be those of a column of fractions."""
    return str(kind).strip().lower().removesuffix(".0")


def _rows(path: Path) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """The name of the column of categories, with names and categories."""
    if path.is_file() and is_sqlite(path):
        with reading_tables(path.resolve()) as (connection, columns, *_):
            table, name, kind = _find(path, columns)
            cursor = connection.execute(f"SELECT {name_sql(name)}, {name_sql(kind)} FROM {name_sql(table)}")
            while rows := cursor.fetchmany(ROWS_A_FETCH):
                yield kind.lower(), rows
        return
    duck, found = open_files(find_table_files(path), "UTC")
    with explained(path):
        table, name, kind = _find(path, found)
        result = duck.execute(f"SELECT {name_sql(name)}, {name_sql(kind)} FROM {name_sql(table)}")
        while fetched := result.fetchmany(ROWS_A_FETCH):
            yield kind.lower(), fetched


def _find(path: Path, columns: Mapping[str, Collection[str]]) -> tuple[str, str, str]:
    """The table of tags, and its columns of names and categories."""
    for table in sorted(columns, key=lambda name: name.lower() not in ("tag", "tags")):
        known = {name.lower(): name for name in columns[table]}
        name = next((known[one] for one in NAME_COLUMNS if one in known), None)
        kind = next((known[one] for one in CATEGORY_COLUMNS if one in known), None)
        if name and kind:
            return table, name, kind
    problems = [Problem(table, f"columns {', '.join(sorted(some)[:40])}") for table, some in columns.items()]
    problems = problems or [Problem("tables", "none in it, or none in DuckDB's schema main")]
    raise ProblemsFound(str(path), problems, "A table of tags has a column name and a column category (or type).")
