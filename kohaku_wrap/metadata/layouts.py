"""The four published layouts of the danbooru2023 database, told apart by their tables and columns."""

from __future__ import annotations

import enum
import re
import sqlite3
from collections.abc import Collection, Mapping

from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.metadata.columns import TAG_TYPES, FoundColumns, SiteMapping, find_columns
from kohaku_wrap.metadata.filters import COLUMNS
from kohaku_wrap.metadata.source import API_LAYOUT

LAYOUT_NAMES = "v0 (tags in post.tag_list), v1, v2, v3 (tags in posttagrelation)"

POST_COLUMNS = tuple(name for name in COLUMNS if name not in ("day", "parent_id"))
"""Columns of `post` that kwrap reads; others are ignored."""

TAG_COLUMNS = ("id", "name", "type", "popularity")
RELATION_COLUMNS = ("post_id", "tag_id")
ID_COLUMNS = {"post": ("id",), "posttagrelation": RELATION_COLUMNS}

TOKEN = re.compile(r"\$([0-9A-Za-z]+)#")
SAMPLED_POSTS = 20_000
TYPED_LISTS = {f"tag_list_{kind}": number for number, kind in enumerate(TAG_TYPES)}
"""Layout v0's lists by tag type, and the type of their tags."""


class Layout(enum.Enum):
    """A published form of the database."""

    V0 = "v0"
    """January 2024: tag ids as tokens in `post.tag_list`, no relation table."""

    V1 = "v1"
    """February 2024: the relation table beside `post.tag_list`."""

    V2 = "v2"
    """March 2024: the relation table only."""

    V3 = "v3"
    """June 2024 on: as v2, with `post.updated_at`."""

    API = API_LAYOUT
    """Of another data set: one table of posts, with their tags in it."""

    @property
    def has_relation(self) -> bool:
        """Whether tags are read from `posttagrelation`."""
        return self not in (Layout.V0, Layout.API)


def is_danbooru2023(columns: Mapping[str, frozenset[str]]) -> bool:
    """Whether there are posts with a relation or with lists of tag ids."""
    return "posttagrelation" in columns or "tag_list" in columns.get("post", ())


def find_posts_table(
    columns: Mapping[str, Collection[str]], mapping: SiteMapping, where: str
) -> tuple[str, FoundColumns] | None:
    """The table of posts with their tags, and which of its columns are read; None where there is none.

    Raises ProblemsFound where there are several and none is called post or posts.
    """
    found = {table: some for table, names in columns.items() if (some := find_columns(names, mapping, where))}
    named = [table for table in found if table in ("post", "posts")] or list(found)
    if len(named) > 1:
        several = [Problem(table, "has an id and tags") for table in named]
        raise ProblemsFound(where, several, "kwrap reads one table: call it posts, or give a file of it alone.")
    return (named[0], found[named[0]]) if named else None


def no_posts(where: str, columns: Mapping[str, Collection[str]], schemas: str = "") -> ProblemsFound:
    """The error for tables of which none holds posts; `schemas`: names of those that have tables, in DuckDB."""
    problems = [Problem(table, f"columns {', '.join(list(some)[:40])}") for table, some in columns.items()]
    elsewhere = f"no table in the schema main; there are some in {schemas}" if schemas else "no table in it"
    needed = "kwrap needs an id and tags (tag_string, tags, or a column for each category). Name them in [metadata]"
    return ProblemsFound(
        where,
        problems or [Problem("tables", elsewhere)],
        "Give kwrap the table as a Parquet file: COPY schema.table TO 'posts.parquet'."
        if schemas and not problems
        else f"{needed} of a dataset file: see datasets/gelbooru.toml.",
    )


def recognise_layout(columns: Mapping[str, frozenset[str]]) -> Layout:
    """The layout that the tables and columns show; the nearest one where parts are missing."""
    post = columns.get("post", frozenset())
    if "posttagrelation" not in columns:
        return Layout.V0 if "tag_list" in post else Layout.V3
    if "tag_list" in post:
        return Layout.V1
    return Layout.V3 if "updated_at" in post else Layout.V2


def missing_parts(layout: Layout, columns: Mapping[str, frozenset[str]]) -> list[Problem]:
    """Every table and column that kwrap reads and that is not there."""
    needed = {"post": POST_COLUMNS, "tag": TAG_COLUMNS}
    if layout is Layout.V0:
        needed["post"] = (*POST_COLUMNS, "tag_list")
    else:
        needed["posttagrelation"] = RELATION_COLUMNS
    missing: list[Problem] = []
    for table, names in needed.items():
        if table not in columns:
            missing.append(Problem(table, "no such table"))
        else:
            missing += [Problem(f"{table}.{name}", "no such column") for name in names if name not in columns[table]]
    return missing


def ids_of_text(connection: sqlite3.Connection, columns: Mapping[str, frozenset[str]]) -> list[Problem]:
    """Every id column that holds its numbers as text, as a CSV file loaded without types does.

    The first row is looked at; sqlite compares texts by letters and never finds a number among them.
    """
    found: list[Problem] = []
    for table, names in ID_COLUMNS.items():
        for name in names if table in columns else ():
            row = connection.execute(f"SELECT {name} FROM {table} LIMIT 1").fetchone()
            if row and isinstance(row[0], str) and row[0].strip().isdecimal():
                what = f"holds text ({row[0][:20]!r}) where kwrap needs whole numbers"
                found.append(Problem(f"{table}.{name}", what))
    return found


def token_base(connection: sqlite3.Connection) -> int:
    """The base of layout v0's tag ids: 36 when any token holds a letter, otherwise what the tags' types say.

    The first revision wrote `$12#` in decimal, later ones in base 36. Tokens of digits alone fit both: then the base
    whose ids are tags of the list's own type more often is right. All single digits mean the same in either.
    """
    lists = [
        name for (name,) in connection.execute("SELECT name FROM pragma_table_info('post')") if name in TYPED_LISTS
    ]
    columns = ", ".join(["tag_list", *lists])
    agreeing = {10: 0, 36: 0}
    types = dict(connection.execute("SELECT id, type FROM tag"))
    rows = connection.execute(f"SELECT {columns} FROM post WHERE length(tag_list) > 0 LIMIT {SAMPLED_POSTS}")
    for whole, *typed in rows:
        tokens = TOKEN.findall(str(whole))
        if any(not (token.isascii() and token.isdecimal()) for token in tokens):
            return 36
        for name, text in zip(lists, typed, strict=True):
            for token in TOKEN.findall(str(text or "")):
                for base in agreeing:
                    agreeing[base] += types.get(int(token, base)) == TYPED_LISTS[name]
        for token in tokens:
            for base in agreeing:
                agreeing[base] += int(token, base) in types
    if agreeing[10] != agreeing[36]:
        return max(agreeing, key=agreeing.__getitem__)
    letter = connection.execute("SELECT 1 FROM post WHERE tag_list GLOB '*[A-Za-z]*' LIMIT 1").fetchone()
    return 36 if letter else 10
