"""Any sqlite file opened so that nothing is written beside it, and what one is shown where it cannot be read."""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.formats.disguises import name_disguise
from kohaku_wrap.metadata.source import DatabaseDamaged

SQLITE_MAGIC = b"SQLite format 3\x00"
HEADER_BYTES = 100
LOCK_TIMEOUT_SECONDS = 5.0

VIEW_SECONDS_VARIABLE = "KWRAP_VIEW_SECONDS"
VIEW_SECONDS = 60.0
"""How long one question to a view may take; a table ends by itself, a view may be endless."""

OPERATIONS_A_LOOK = 100_000
"""Steps of sqlite's machine between two looks at the clock: a few milliseconds."""

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


def is_sqlite(path: Path) -> bool:
    """Whether a file is a sqlite database, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC


@contextlib.contextmanager
def reading_tables(path: Path) -> Iterator[tuple[sqlite3.Connection, dict[str, frozenset[str]], str, bool]]:
    """A connection to any sqlite file and the columns of its tables, in small letters; and how it was opened."""
    _check_file(path)
    uri, private_wal_index = _reading_uri(path)
    with connected(path, uri, private_wal_index) as connection:
        yield connection, _columns_of_tables(connection), uri, private_wal_index


def first_value(connection: sqlite3.Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


@contextlib.contextmanager
def connected(path: Path, uri: str, private_wal_index: bool) -> Iterator[sqlite3.Connection]:
    """A connection that reads texts as they come and is closed after the block."""
    with (
        explained(path),
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_SECONDS)) as connection,
    ):
        connection.text_factory = decode
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


def decode(text: bytes) -> str:
    """A text of sqlite, which keeps bytes as they come; those that are no UTF-8 become U+FFFD."""
    return text.decode("utf-8", "replace")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
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
