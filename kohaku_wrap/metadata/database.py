"""The metadata database, opened for reading only: what it is, which layout, and rows as Arrow batches."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.file_hashes import sha256_of_text
from kohaku_wrap.metadata.columns import DANBOORU, SiteMapping
from kohaku_wrap.metadata.dialects import Sqlite, name_sql
from kohaku_wrap.metadata.editions import danbooru_posts_sql, make_edition
from kohaku_wrap.metadata.layouts import (
    LAYOUT_NAMES,
    Layout,
    find_posts_table,
    ids_of_text,
    is_danbooru2023,
    missing_parts,
    no_posts,
    recognise_layout,
    token_base,
)
from kohaku_wrap.metadata.source import ROWS_A_BATCH, Edition, Source, digest_of_files
from kohaku_wrap.metadata.sqlite_files import (
    PRIVATE_WAL_INDEX,
    connected,
    decode,
    explained,
    first_value,
    limit_time,
    reading_tables,
)

MIXED_COLUMN = re.compile(r"Type mismatch in column (\d+): expected INT64")
"""What the driver says of another kind of value after its first batch; texts and fractions are cast by each query."""

READ_TABLES = ("post", "tag", "posttagrelation")


@dataclass(frozen=True)
class Database(Source):
    """A sqlite database that was recognised and may be read, by any number of connections at once."""

    uri: str
    """How sqlite opens it so that nothing is written beside it."""

    private_wal_index: bool
    """Whether a WAL is read whose shared index file does not exist."""

    layout: Layout
    """Which of the four published forms of danbooru2023 it has, or that it is a table of posts with their tags."""

    columns: Mapping[str, frozenset[str]]
    """The columns of each table, in lower case."""

    indexed: frozenset[str]
    """`table.column` of every column that leads an index."""

    token_base: int
    """The base of the tag ids in `post.tag_list`: 10 or 36 in layout v0, 0 in the others."""

    has_views: bool
    """Whether any of the tables that are read is a view, which is read under a limit of time."""

    has_row_ids: bool
    """Whether the relation can be read by stretches of rowid, as all but views and WITHOUT ROWID tables can."""

    @contextlib.contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """A connection for small queries; its failures become the errors of this module."""
        with connected(self.path, self.uri, self.private_wal_index) as connection:
            if self.has_views:
                limit_time(connection)
            yield connection

    def dialect(self, table: str) -> Sqlite:
        """How values are asked for; each has a type of its own."""
        return Sqlite()

    def value(self, query: str) -> Any:
        """The first column of the first row of a small query, None without a row."""
        with self.connect() as connection:
            return first_value(connection, query)

    @property
    def of_first_rows(self) -> str:
        """What a condition on rows of `post` needs so that of several of one id only the first is found."""
        if self.edition.unique_ids or "rowid AS place" not in self.edition.posts:
            return ""
        return " AND rowid IN (SELECT min(rowid) FROM post GROUP BY id)"

    def count_posts(self) -> int:
        """The largest rowid; 0 where there is none."""
        return int(self.value(f"SELECT max(place) FROM ({self.edition.posts})") or 0)

    def digest(self) -> str:
        """A cheap fingerprint of the content: the layout and the ends and sizes of the tables.

        Copies have the same one, with or without indexes; reading it takes no scan.
        """
        if self.edition.has_tag_strings:
            return digest_of_files([self.path])
        questions = ["SELECT max(id) FROM post", "SELECT min(id) FROM post", "SELECT max(id) FROM tag"]
        if not self.layout.has_relation:
            questions.append("SELECT tag_list FROM post ORDER BY id DESC LIMIT 1")
        elif self.has_row_ids:
            questions.append("SELECT max(rowid) FROM posttagrelation")
        questions.append("SELECT created_at || ' ' || fav_count || ' ' || score FROM post ORDER BY id DESC LIMIT 1")
        answers = [self.layout.value, *(str(self.value(question)) for question in questions)]
        return sha256_of_text("\n".join(answers))

    def scan(self, query: str, rows: int = ROWS_A_BATCH) -> Iterator[pa.RecordBatch]:
        """The rows of a large query as Arrow batches of some 65,000, read without a Python object a value.

        Columns take the type of their first values, so a query casts what may be NULL or of mixed type. Bytes of a
        text that are no UTF-8 come as U+FFFD.
        """
        if self.has_views:
            yield from self._scan_views(query)
            return
        import adbc_driver_sqlite.dbapi as adbc

        with (
            explained(self.path),
            adbc.connect(self.uri, autocommit=True) as connection,
            connection.cursor() as cursor,
        ):
            if self.private_wal_index:
                cursor.execute(PRIVATE_WAL_INDEX)
                cursor.fetchall()
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(rows)})
            cursor.execute(query)
            names = [column[0] for column in cursor.description or ()]
            try:
                yield from map(_with_readable_text, cursor.fetch_record_batch())
            except OSError as error:
                if mixed := MIXED_COLUMN.search(str(error)):
                    raise self.no_whole_number(names[int(mixed[1])]) from error
                raise

    def _scan_views(self, query: str) -> Iterator[pa.RecordBatch]:
        """`scan` through the driver that can be stopped; slower."""
        with self.connect() as connection:
            cursor = connection.execute(query)
            names = [column[0] for column in cursor.description or ()]
            while rows := cursor.fetchmany(ROWS_A_BATCH):
                yield pa.record_batch([pa.array(column) for column in zip(*rows, strict=True)], names=names)


def open_database(path: Path, mapping: SiteMapping = DANBOORU) -> Database:
    """Recognise the sqlite database at `path` and check that everything kwrap reads is there.

    `mapping`: how a table of posts of another site is read.

    Raises NotADatabase, DatabaseDamaged, DatabaseLocked or DatabaseUnreadable, and ProblemsFound with every table and
    column that is missing, or every id column of text. Nothing is ever written beside the file.
    """
    with reading_tables(path) as (connection, columns, uri, private_wal_index):
        found = None if is_danbooru2023(columns) else find_posts_table(columns, mapping, str(path))
        has_views = _has_views(connection, (found[0],) if found else READ_TABLES)
        if has_views:
            limit_time(connection)
        if found:
            table, some = found
            ask = partial(first_value, connection)
            name = f"API columns in the table {table}, sqlite"
            edition = make_edition(name, some, Sqlite(), name_sql(table), place_sql(connection, table), ask, mapping)
            return Database(
                path, edition, (path,), uri, private_wal_index, Layout.API, columns, frozenset(), 0, has_views, False
            )
        if not any(table in columns for table in READ_TABLES):
            raise no_posts(str(path), columns)
        layout = recognise_layout(columns)
        if missing := missing_parts(layout, columns):
            layouts = f"kwrap reads the danbooru2023 database in these layouts: {LAYOUT_NAMES}."
            raise ProblemsFound(str(path), missing, layouts)
        if as_text := ids_of_text(connection, columns):
            anew = "Make each table anew: CREATE TABLE new AS SELECT CAST(id AS INTEGER) AS id, … FROM post."
            raise ProblemsFound(str(path), as_text, anew)
        indexed = _indexed_columns(connection, columns)
        base = token_base(connection) if layout is Layout.V0 else 0
        has_row_ids = layout.has_relation and place_sql(connection, "posttagrelation") == "rowid"
        has_parents = "parent_id" in columns["post"]
        posts = danbooru_posts_sql(Sqlite(), place_sql(connection, "post"), has_parents)
        unique = _refuses_second_id(connection)
    name = f"danbooru2023 {layout.value}, sqlite"
    edition = Edition(name, layout.value, posts, unique, has_parents=has_parents)
    opened = (uri, private_wal_index, layout, columns, indexed, base, has_views, has_row_ids)
    return Database(path, edition, (path,), *opened)


def _has_views(connection: sqlite3.Connection, tables: Sequence[str]) -> bool:
    """Whether one of the tables is a view."""
    views = connection.execute("SELECT lower(name) FROM sqlite_master WHERE type = 'view'").fetchall()
    return any(name in tables for (name,) in views)


def _indexed_columns(connection: sqlite3.Connection, columns: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """`table.column` of every column that comes first in an index."""
    found = set()
    for table in columns:
        for (index,) in connection.execute("SELECT name FROM pragma_index_list(?)", (table,)).fetchall():
            first = connection.execute("SELECT name FROM pragma_index_info(?) ORDER BY seqno", (index,)).fetchone()
            if first and first[0]:
                found.add(f"{table}.{first[0].lower()}")
    return frozenset(found)


def place_sql(connection: sqlite3.Connection, table: str) -> str:
    """SQL for the place of a row in a table: its rowid, or 0 for a view and a table that has none."""
    kind, definition = connection.execute(
        "SELECT type, sql FROM sqlite_master WHERE lower(name) = ? AND type IN ('table', 'view')", (table.lower(),)
    ).fetchone()
    has_none = kind == "view" or "WITHOUT ROWID" in " ".join(definition.upper().split())
    return "0" if has_none else "rowid"


def _refuses_second_id(connection: sqlite3.Connection) -> bool:
    """Whether the key of the table `post` is its id alone."""
    key = connection.execute("SELECT lower(name) FROM pragma_table_info('post') WHERE pk").fetchall()
    return key == [("id",)]


def _with_readable_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, with U+FFFD where bytes of a text are no UTF-8."""
    for number, column in enumerate(batch.columns):
        if not pa.types.is_string(column.type):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            texts = [None if text is None else decode(text) for text in column.cast(pa.binary()).to_pylist()]
            batch = batch.set_column(number, batch.schema.names[number], pa.array(texts, type=pa.string()))
    return batch
