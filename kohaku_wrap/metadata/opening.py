"""A metadata set of any edition, recognised by what is in it, never by its name."""

from __future__ import annotations

from pathlib import Path

from kohaku_wrap.files import describe_absence
from kohaku_wrap.metadata.columns import DANBOORU, SiteMapping
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.sqlite_files import DatabaseMissing, is_sqlite
from kohaku_wrap.metadata.table_files import find_table_files, is_table_file
from kohaku_wrap.metadata.tables import open_tables


def open_metadata(path: Path, mapping: SiteMapping = DANBOORU) -> Source:
    """Recognise the file or folder at `path` and check that everything kwrap reads is there.

    `mapping`: how another site's table is read. Raises DatabaseMissing, and what `open_database` and `open_tables`
    raise. Nothing is written beside the files.
    """
    given, path = path, path.resolve()
    if not path.is_file() and not path.is_dir():
        raise DatabaseMissing(
            f"{given}: {describe_absence(path)}",
            "Give a metadata set with --db, or make a small world with `kwrap demo DIR`.",
        )
    if path.is_dir() or is_table_file(path):
        return open_tables(find_table_files(path), mapping)
    return open_database(path, mapping)


def is_metadata(path: Path) -> bool:
    """Whether a file or folder could be a metadata set, for what shows files of any kind."""
    if not path.is_file():
        return path.is_dir()
    return is_sqlite(path) or (not path.name.endswith(".safetensors") and is_table_file(path))
