"""Tables of posts in Parquet, DuckDB, CSV or JSON files, read through DuckDB with bounded memory."""

from __future__ import annotations

import contextlib
import glob
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound
from kohaku_wrap.metadata.columns import FoundColumns, SiteMapping
from kohaku_wrap.metadata.dialects import Duck, is_leaf, is_text, name_sql
from kohaku_wrap.metadata.editions import danbooru_posts_sql, make_edition
from kohaku_wrap.metadata.filters import quote
from kohaku_wrap.metadata.layouts import (
    find_posts_table,
    is_danbooru2023,
    missing_parts,
    no_posts,
    recognise_layout,
)
from kohaku_wrap.metadata.parallel import usable_threads
from kohaku_wrap.metadata.source import ROWS_A_BATCH, DatabaseDamaged, Edition, Source, digest_of_files
from kohaku_wrap.metadata.sqlite_files import DatabaseLocked, DatabaseUnreadable
from kohaku_wrap.metadata.table_files import TableFiles, read_schema

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "768MB"
"""What DuckDB holds before it writes to temporary files."""

PLACE_COLUMNS = ("file_index", "file_row_number")
"""What DuckDB adds to the rows of Parquet files: where they stand."""

_TEXT_TYPES = re.compile(r"\b(TIMESTAMP( WITH TIME ZONE|_[A-Z]+)?|DATE|TIME|UUID|JSON)\b(?!\")")
"""Of JSON, what is read as texts; DuckDB's own JSON is what holds values of several kinds."""

Columns = Mapping[str, Mapping[str, tuple[str, pa.DataType]]]
"""By table, its columns of one value or a list of texts a row, each with its SQL and type; `a.b` may be b in the
structure a, or a column of that name."""


@dataclass(frozen=True)
class Tables(Source):
    """Tables of posts that were recognised."""

    connection: duckdb.DuckDBPyConnection
    """In which every table has its name."""

    columns: Columns
    """What the tables hold."""

    def dialect(self, table: str) -> Duck:
        """How values of the table are asked for, by the types of its columns."""
        return Duck(self.columns[table])

    def scan(self, query: str, rows: int = ROWS_A_BATCH) -> Iterator[pa.RecordBatch]:
        """The rows of a large query as Arrow batches of `rows`, in the order of the files."""
        with explained(self.path):
            yield from self.connection.cursor().sql(query).to_arrow_reader(rows)

    def value(self, query: str) -> Any:
        """The first column of the first row of a small query, None without a row."""
        return _first(self.connection, self.path, query)

    def count_posts(self) -> int:
        """How many rows of posts there are, by the files' own count where they have one."""
        return int(self.value(f"SELECT count(*) FROM ({self.edition.posts}) AS post"))

    def digest(self) -> str:
        """A fingerprint of the files."""
        return digest_of_files(self.files)


def open_tables(files: TableFiles, mapping: SiteMapping) -> Tables:
    """Recognise the tables of `files` and check that everything kwrap reads is there.

    Raises DatabaseDamaged, DatabaseLocked or DatabaseUnreadable, and ProblemsFound for what is missing.
    """
    connection, columns = open_files(files, mapping.zone)
    edition = _recognise(files, columns, mapping, partial(_first, connection, files.path))
    return Tables(files.path, edition, files.every, connection, columns)


def open_files(files: TableFiles, zone: str) -> tuple[duckdb.DuckDBPyConnection, Columns]:
    """A connection in which every table of the files has its name, and their columns."""
    import duckdb

    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": usable_threads(),
        "temp_directory": tempfile.gettempdir(),
        "autoinstall_known_extensions": False,
        # It makes a join of a list of words, and the rows of a join come in any order.
        "disabled_optimizers": "in_clause",
    }
    with explained(files.path):
        is_database = files.kind == "duckdb"
        connection = duckdb.connect(str(files.path) if is_database else ":memory:", is_database, config)
        connection.execute(f"SET GLOBAL TimeZone = {quote(zone)}")
        for name, paths in files.tables.items():
            connection.execute(f"CREATE VIEW {name_sql(name)} AS SELECT {_reader(connection, files, paths)}")
        names = list(files.tables) or [name for (name,) in connection.execute("SHOW TABLES").fetchall()]
        return connection, {name.lower(): _columns_of(connection, name) for name in names}


def _recognise(
    files: TableFiles,
    columns: Columns,
    mapping: SiteMapping,
    ask: Callable[[str], Any],
) -> Edition:
    where = str(files.path)
    known = {table: frozenset(map(str.lower, some)) for table, some in columns.items()}
    place = "file_index * 1099511627776 + file_row_number" if files.kind == "parquet" else "row_number() OVER ()"
    if is_danbooru2023(known):
        layout = recognise_layout(known)
        missing = missing_parts(layout, known)
        if not layout.has_relation:
            missing.append(Problem("posttagrelation", "no such table"))
        if missing:
            raise ProblemsFound(where, missing, "kwrap reads the tables post, tag and posttagrelation of danbooru2023.")
        has_parents = "parent_id" in known["post"]
        sql = danbooru_posts_sql(Duck(columns["post"]), place, has_parents)
        return Edition(f"danbooru2023 {layout.value}, {files.describe()}", layout.value, sql, has_parents=has_parents)
    found = find_posts_table({table: list(some) for table, some in columns.items()}, mapping, where)
    if not found:
        raise no_posts(where, columns, ask("SELECT string_agg(DISTINCT schema_name, ', ') FROM duckdb_tables()") or "")
    table, some = found
    _refuse_mixed(files, table, some, columns[table])
    named = "" if files.tables else f" in the table {table}"
    name = f"API columns{named}, {files.describe(table)}"
    return make_edition(name, some, Duck(columns[table]), name_sql(table), place, ask, mapping)


def _refuse_mixed(
    files: TableFiles, table: str, found: FoundColumns, columns: Mapping[str, tuple[str, pa.DataType]]
) -> None:
    """Raise ProblemsFound for files of a table that lack the id or tags which the others have, or have them as texts
    where others have lists."""
    needed = [found.posts["id"], *found.whole, *(name for names in found.typed.values() for name in names)]
    lists = [name for name in needed if pa.types.is_nested(columns[name][1])]
    problems = []
    for path in files.tables.get(table, ()) if files.kind == "parquet" else ():
        has = {name.lower(): kind for name, (_, kind) in _leaves(read_schema(path)).items()}
        missing = [name for name in needed if name.lower() not in has]
        problems += [Problem(path.name, f"no column {', '.join(missing)}, which other files have")] if missing else []
        texts = [name for name in lists if is_text(has.get(name.lower(), pa.null()))]
        problems += [Problem(path.name, f"{', '.join(texts)}: text, in other files lists")] if texts else []
    if problems:
        raise ProblemsFound(str(files.path), problems, "These are files of different sets: give one set alone.")


def _reader(connection: duckdb.DuckDBPyConnection, files: TableFiles, paths: Sequence[Path]) -> str:
    """What selects the rows of the files as one table."""
    # DuckDB takes a name with *, ? or [ for a pattern of others.
    listed = "[" + ", ".join(quote(glob.escape(str(path))) for path in paths) + "]"
    if files.kind == "parquet":
        return f"*, file_index, file_row_number FROM read_parquet({listed}, union_by_name = true)"
    if files.kind == "csv":
        # As texts: what each is, a dialect says.
        return f"* FROM read_csv({listed}, all_varchar = true, header = true, union_by_name = true)"
    reader = f"read_json({listed}, union_by_name = true, sample_size = -1, maximum_object_size = {1 << 24}"
    described = connection.execute(f"DESCRIBE SELECT * FROM {reader})").fetchall()
    # Dates stay as they are written: DuckDB would take their offset away.
    kinds = {name: _TEXT_TYPES.sub("VARCHAR", kind) for name, kind, *_ in described}
    written = ", ".join(f"{quote(name)}: {quote(kind)}" for name, kind in kinds.items())
    return f"* FROM {reader}, columns = {{{written}}})"


def _columns_of(connection: duckdb.DuckDBPyConnection, table: str) -> dict[str, tuple[str, pa.DataType]]:
    schema = connection.sql(f"SELECT * FROM {name_sql(table)} LIMIT 0").to_arrow_reader(1).schema
    return {name: column for name, column in _leaves(schema).items() if name not in PLACE_COLUMNS}


def _leaves(fields: Any, prefix: str = "", way: str = "") -> dict[str, tuple[str, pa.DataType]]:
    """All columns with values, those within structures too: by name, SQL and type."""
    found: dict[str, tuple[str, pa.DataType]] = {}
    for one in fields:
        sql = way + name_sql(one.name)
        if pa.types.is_struct(one.type):
            found |= _leaves(one.type, f"{prefix}{one.name}.", f"{sql}.")
        elif is_leaf(one.type):
            found[prefix + one.name] = sql, one.type
    return found


def _first(connection: duckdb.DuckDBPyConnection, path: Path, query: str) -> Any:
    with explained(path):
        row = connection.cursor().execute(query).fetchone()
    return row[0] if row else None


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure of DuckDB into the error that a person can act on."""
    import duckdb

    try:
        yield
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except (duckdb.Error, pa.ArrowException) as error:
        raise explain_failure(path, str(error)) from error


def explain_failure(path: Path, message: str) -> KwrapError:
    """The error for what DuckDB said about the files at `path`."""
    said, first = message.lower(), message.strip().splitlines()[0]
    if "could not set lock" in said:
        return DatabaseLocked(f"{path}: locked by another program that writes to it", "Wait until it is done.")
    if "out of memory" in said or "no space left" in said or "temporary" in said:
        temporary = tempfile.gettempdir()
        return DatabaseUnreadable(f"{path}: {first}", f"kwrap sorts in {temporary}; set TMPDIR to a larger disk.")
    if "version" in said and "storage" in said:
        return DatabaseUnreadable(f"{path}: {first}", "Update duckdb: pip install -U duckdb.")
    return DatabaseDamaged(f"{path}: cannot be read: {first}", "Download or copy it again.")
