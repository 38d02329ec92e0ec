"""The metadata database, opened for reading only: what it is, which layout, and rows as Arrow batches."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from kohaku_wrap.errors import KwrapError, ProblemsFound, UsageError
from kohaku_wrap.files import describe_absence
from kohaku_wrap.formats.disguises import name_disguise
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
    recognise_layout,
    token_base,
)
from kohaku_wrap.metadata.source import ROWS_A_BATCH, DatabaseDamaged, Edition, Source, digest_of_files

SQLITE_MAGIC = b"SQLite format 3\x00"
HEADER_BYTES = 100
LOCK_TIMEOUT_SECONDS = 5.0

VIEW_SECONDS_VARIABLE = "KWRAP_VIEW_SECONDS"
VIEW_SECONDS = 60.0
"""How long one question to a view may take; a table ends by itself, a view may be endless."""

OPERATIONS_A_LOOK = 100_000
"""Steps of sqlite's machine between two looks at the clock: a few milliseconds."""

READ_TABLES = ("post", "tag", "posttagrelation")

PRIVATE_WAL_INDEX = "PRAGMA locking_mode = EXCLUSIVE"
"""Said before the first read, it keeps the index of the WAL in memory instead of in a new file beside the database."""


class DatabaseMissing(KwrapError):
    """There is no file at the path."""


class NotADatabase(KwrapError):
    """The file is something else than a sqlite database."""


class DatabaseLocked(KwrapError):
    """Another program holds the database for writing."""


class EndlessView(KwrapError):
    """A view of the database gave no end in time."""


class DatabaseUnreadable(KwrapError):
    """sqlite cannot read the file for a reason of the machine or of the database's own."""


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
        with _connected(self.path, self.uri, self.private_wal_index) as connection:
            if self.has_views:
                limit_time(connection)
            yield connection

    def dialect(self, table: str) -> Sqlite:
        """How values are asked for; each has a type of its own."""
        return Sqlite()

    def value(self, query: str) -> Any:
        """The first column of the first row of a small query, None without a row."""
        with self.connect() as connection:
            return _first_value(connection, query)

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
        return hashlib.sha256("\n".join(answers).encode()).hexdigest()

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
            _explained(self.path),
            adbc.connect(self.uri, autocommit=True) as connection,
            connection.cursor() as cursor,
        ):
            if self.private_wal_index:
                cursor.execute(PRIVATE_WAL_INDEX)
                cursor.fetchall()
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(rows)})
            cursor.execute(query)
            yield from map(_with_readable_text, cursor.fetch_record_batch())

    def _scan_views(self, query: str) -> Iterator[pa.RecordBatch]:
        """`scan` through the driver that can be stopped; slower."""
        with self.connect() as connection:
            cursor = connection.execute(query)
            names = [column[0] for column in cursor.description]
            while rows := cursor.fetchmany(ROWS_A_BATCH):
                yield pa.record_batch([pa.array(column) for column in zip(*rows, strict=True)], names=names)


def open_database(path: Path, mapping: SiteMapping = DANBOORU) -> Database:
    """Recognise the sqlite database at `path` and check that everything kwrap reads is there.

    `mapping`: how a table of posts of another site is read.

    Raises DatabaseMissing, NotADatabase, DatabaseDamaged, DatabaseLocked or DatabaseUnreadable, and ProblemsFound
    with every table and column that is missing, or every id column of text. Nothing is ever written beside the file.
    """
    given = path
    path = path.resolve()
    if not path.is_file():
        raise DatabaseMissing(
            f"{given}: {describe_absence(path)}",
            "Give the danbooru2023 sqlite file with --db, or make a small world with `kwrap demo DIR`.",
        )
    with reading_tables(path) as (connection, columns, uri, private_wal_index):
        found = None if is_danbooru2023(columns) else find_posts_table(columns, mapping, str(path))
        has_views = _has_views(connection, (found[0],) if found else READ_TABLES)
        if has_views:
            limit_time(connection)
        if found:
            table, some = found
            ask = partial(_first_value, connection)
            name = f"API columns in the table {table}, sqlite"
            edition = make_edition(name, some, Sqlite(), name_sql(table), place_sql(connection, table), ask, mapping)
            return Database(
                path, edition, (path,), uri, private_wal_index, Layout.API, columns, frozenset(), 0, has_views, False
            )
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


def is_sqlite(path: Path) -> bool:
    """Whether a file is a sqlite database, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC


@contextlib.contextmanager
def reading_tables(path: Path) -> Iterator[tuple[sqlite3.Connection, dict[str, frozenset[str]], str, bool]]:
    """A connection to any sqlite file and the columns of its tables, in small letters; and how it was opened."""
    _check_file(path)
    uri, private_wal_index = _reading_uri(path)
    with _connected(path, uri, private_wal_index) as connection:
        yield connection, _columns_of_tables(connection), uri, private_wal_index


def _first_value(connection: sqlite3.Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


@contextlib.contextmanager
def _connected(path: Path, uri: str, private_wal_index: bool) -> Iterator[sqlite3.Connection]:
    """A connection that reads texts as they come and is closed after the block."""
    with (
        _explained(path),
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_SECONDS)) as connection,
    ):
        connection.text_factory = _decode
        if private_wal_index:
            connection.execute(PRIVATE_WAL_INDEX).fetchall()
        yield connection


def _check_file(path: Path) -> None:
    """Refuse what the header alone shows to be no database, or one that is cut off."""
    with path.open("rb") as stream:
        header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(SQLITE_MAGIC):
        raise NotADatabase(
            f"{path}: not a sqlite database" + (f" but {what}" if (what := name_disguise(header)) else ""),
            "If it was downloaded, compare its size: an error page or a Git LFS pointer is a small text file.",
        )
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    pages = int.from_bytes(header[28:32], "big")
    counted_by_writer = header[24:28] == header[92:96]
    size_bytes = path.stat().st_size
    wal = path.with_name(path.name + "-wal")
    if counted_by_writer and size_bytes < pages * page_bytes and not (wal.exists() and wal.stat().st_size):
        raise DatabaseDamaged(
            f"{path}: cut off: {size_bytes:,} bytes on disk, {pages * page_bytes:,} by its own header",
            "Download or copy it again.",
        )


def _reading_uri(path: Path) -> tuple[str, bool]:
    """The sqlite URI that reads `path` and writes nothing beside it, and whether the WAL's index must be private.

    A database in WAL mode without a WAL is whole as it is; opened plainly, sqlite would make the files of a WAL. A
    WAL without its index is what a copy or a crash leaves: it is read with an index in memory.
    """
    plain = "file:" + quote(str(path)) + "?mode=ro"
    with path.open("rb") as stream:
        in_wal_mode = stream.read(19)[18] == 2
    if not in_wal_mode or path.with_name(path.name + "-shm").exists():
        return plain, False
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        return plain + "&vfs=unix-none", True
    return plain + "&immutable=1", False


def _columns_of_tables(connection: sqlite3.Connection) -> dict[str, frozenset[str]]:
    """The columns of every ordinary table; virtual tables, which need modules of their own, are left out."""
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND sql NOT LIKE 'CREATE VIRTUAL%'"
    ).fetchall()
    return {
        name.lower(): frozenset(
            column.lower() for (column,) in connection.execute("SELECT name FROM pragma_table_info(?)", (name,))
        )
        for (name,) in tables
    }


def _has_views(connection: sqlite3.Connection, tables: Sequence[str]) -> bool:
    """Whether one of the tables is a view."""
    views = connection.execute("SELECT lower(name) FROM sqlite_master WHERE type = 'view'").fetchall()
    return any(name in tables for (name,) in views)


def limit_time(connection: sqlite3.Connection) -> None:
    """Let sqlite end with `interrupted` what this connection still does after VIEW_SECONDS."""
    end = time.monotonic() + view_seconds()
    connection.set_progress_handler(lambda: time.monotonic() > end, OPERATIONS_A_LOOK)


def view_seconds() -> float:
    """VIEW_SECONDS, or what the variable KWRAP_VIEW_SECONDS says. Raises UsageError."""
    given = os.environ.get(VIEW_SECONDS_VARIABLE, "")
    try:
        return float(given) if given else VIEW_SECONDS
    except ValueError:
        raise UsageError(f"{VIEW_SECONDS_VARIABLE}={given}: not a number of seconds") from None


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


def _decode(text: bytes) -> str:
    """A text of sqlite, which keeps bytes as they come; those that are no UTF-8 become U+FFFD."""
    return text.decode("utf-8", "replace")


def _with_readable_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, with U+FFFD where bytes of a text are no UTF-8."""
    for number, column in enumerate(batch.columns):
        if not pa.types.is_string(column.type):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            texts = [None if text is None else _decode(text) for text in column.cast(pa.binary()).to_pylist()]
            batch = batch.set_column(number, batch.schema.names[number], pa.array(texts, type=pa.string()))
    return batch


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a failure of sqlite, from either driver, into the error that a person can act on."""
    import adbc_driver_manager

    try:
        yield
    except (sqlite3.Error, adbc_driver_manager.Error, pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowInvalid) and "sqlite" not in str(error).lower():
            raise
        raise explain_failure(path, str(error)) from error


def explain_failure(path: Path, message: str) -> KwrapError:
    """The error for what sqlite said about the database at `path`."""
    said = message.lower()
    if "locked" in said or "busy" in said:
        return DatabaseLocked(
            f"{path}: locked by another program that writes to it",
            "Wait until that program is done, or read a copy of the database.",
        )
    if said.startswith("interrupted"):
        return EndlessView(
            f"{path}: a view in it gave no end within {view_seconds():g} s",
            f"Make a table of it (CREATE TABLE … AS SELECT …), or give it more time with {VIEW_SECONDS_VARIABLE}=600.",
        )
    if "not a database" in said or "encrypted" in said:
        return NotADatabase(f"{path}: not a sqlite database, or an encrypted one", "Download or copy it again.")
    if "malformed" in said or "disk i/o error" in said or "corrupt" in said:
        return DatabaseDamaged(f"{path}: damaged or cut off ({message.splitlines()[0]})", "Download or copy it again.")
    if path.with_name(path.name + "-journal").exists():
        return DatabaseUnreadable(
            f"{path}: a write to it was interrupted; its rollback journal lies beside it",
            f"Open it once, so that sqlite can roll back: {shlex.join(('sqlite3', str(path), '.tables'))}",
        )
    return DatabaseUnreadable(f"{path}: {message}", "Check the file and its folder's permissions.")
