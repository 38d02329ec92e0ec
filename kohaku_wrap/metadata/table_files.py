"""Which files a metadata set is made of: one file, shards, the tables of a dump, or JSON beside images."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import list_below, sort_files
from kohaku_wrap.formats.disguises import START_BYTES, name_disguise
from kohaku_wrap.metadata.source import DatabaseDamaged

PARQUET_MAGIC = b"PAR1"
DUCKDB_MAGIC = b"DUCK"
"""Eight bytes after the beginning of the file."""

DUMP_TABLES = ("post", "tag", "posttagrelation", "localpost")
SUFFIXES = {
    "parquet": (".parquet",),
    "csv": (".csv", ".csv.gz", ".tsv"),
    "json": (".json", ".jsonl", ".ndjson"),
}
NAMES_OF_KINDS = {"parquet": "Parquet", "csv": "CSV", "json": "JSON", "duckdb": "DuckDB"}
SHARD = re.compile(r"^(?P<name>.*?)[-_.]?(?P<number>\d+)(?:-of-(?P<all>\d+))?$")


class NoTables(UsageError):
    """There is nothing at the path that could be a metadata set."""


@dataclass(frozen=True)
class TableFiles:
    """The files of a metadata set."""

    path: Path
    """The file or folder that was given."""

    kind: str
    """parquet, csv, json or duckdb."""

    tables: Mapping[str, tuple[Path, ...]]
    """Files by table, in order; empty for a DuckDB database, which has tables of its own."""

    @property
    def every(self) -> tuple[Path, ...]:
        """All files."""
        return tuple(path for paths in self.tables.values() for path in paths) or (self.path,)

    def describe(self, table: str = "") -> str:
        """Such as "10 Parquet files"; of one table, where it is named."""
        files = sum(len(paths) for name, paths in self.tables.items() if table in ("", name))
        name = NAMES_OF_KINDS[self.kind]
        return name if files <= 1 else f"{files:,} {name} files"


def is_table_file(path: Path) -> bool:
    """Whether a file is a table that is read through DuckDB, by its first bytes or its name."""
    return kind_of_file(path) is not None


def kind_of_file(path: Path) -> str | None:
    """parquet, csv, json, duckdb, or None for any other file."""
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    if start[8:12] == DUCKDB_MAGIC:
        return "duckdb"
    if start.startswith(PARQUET_MAGIC):
        return "parquet"
    name = path.name.lower()
    kind = next((kind for kind, endings in SUFFIXES.items() if name.endswith(endings)), None)
    if kind and kind != "json" and (what := "" if name.endswith(".gz") else name_disguise(start)):
        raise NoTables(f"{path}: not a {NAMES_OF_KINDS[kind]} file but {what}", "Give the file itself.")
    if kind == "parquet":
        raise DatabaseDamaged(f"{path}: not a Parquet file: it does not begin with PAR1", "Download or copy it again.")
    return kind


def find_table_files(path: Path) -> TableFiles:
    """The tables of a file or folder. Raises NoTables, DatabaseDamaged, and ProblemsFound for missing shards."""
    if path.is_dir():
        return _find_in_folder(path)
    kind = kind_of_file(path)
    if kind is None:
        raise NoTables(f"{path}: no Parquet, DuckDB, CSV or JSON file", "Give a table with --tags.")
    if kind == "duckdb":
        return TableFiles(path, kind, {})
    if kind == "parquet" and path.stem in DUMP_TABLES:
        beside = [path.with_name(f"{name}.parquet") for name in DUMP_TABLES]
        tables = {one.stem: (one,) for one in beside if one.is_file()}
        if "posttagrelation" in tables:
            return _checked(TableFiles(path.parent, kind, tables))
    return _checked(TableFiles(path, kind, {"posts": (path,)}))


def _find_in_folder(folder: Path) -> TableFiles:
    for kind, endings in SUFFIXES.items():
        deep = sort_files(one for one in list_below(folder) if one.name.lower().endswith(endings))
        deep = [one for one in deep if one.name != "info.json" and not one.name.startswith(".")]
        files = [one for one in deep if one.parent == folder] or deep
        if not files:
            continue
        if kind == "json":
            return TableFiles(folder, kind, {"posts": tuple(files)})
        tables: dict[str, list[Path]] = {}
        for one in files:
            tables.setdefault(_table_of(one), []).append(one)
        for some in tables.values():
            _refuse_gaps(folder, some)
        return _checked(TableFiles(folder, kind, {name: tuple(some) for name, some in tables.items()}))
    raise NoTables(
        f"{folder}: no Parquet, CSV or JSON file in this folder",
        "Give the file or folder of a metadata set, or the danbooru2023 sqlite file, with --db.",
    )


def _stem(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(next(ending for some in SUFFIXES.values() for ending in some if name.endswith(ending)))


def _table_of(path: Path) -> str:
    """The name that a file shares with the other shards of its table, in small letters."""
    shard = SHARD.match(_stem(path))
    return (shard["name"] if shard else _stem(path)) or "posts"


def _refuse_gaps(folder: Path, files: Sequence[Path]) -> None:
    """Raise ProblemsFound for shards that the numbers in the names show to be missing."""
    shards = [shard for path in files if (shard := SHARD.match(_stem(path)))]
    numbers = {int(shard["number"]) for shard in shards}
    counts = {int(shard["all"]) for shard in shards if shard["all"]}
    first, stop = min(numbers, default=0), max(numbers, default=-1) + 1
    if counts:
        first = 1 if max(counts) in numbers else 0
        stop = first + max(counts)
    elif stop - first - len(numbers) > len(numbers) // 2:
        # Numbers with wide gaps count something else than shards, such as the first id or a time.
        return
    if missing := stop - first - sum(first <= number < stop for number in numbers):
        some = itertools.islice((number for number in range(first, stop) if number not in numbers), 10)
        what = f"{missing:,} of {stop - first:,} files: {', '.join(map(str, some))}"
        name = _table_of(files[0])
        raise ProblemsFound(str(folder), [Problem(name, f"missing {what}")], "Download the missing files too.")


def _checked(files: TableFiles) -> TableFiles:
    """The files, after a look at the end of each Parquet file. Raises DatabaseDamaged."""
    for path in files.every if files.kind == "parquet" else ():
        read_schema(path)
    return files


def read_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file. Raises DatabaseDamaged."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise DatabaseDamaged(
            f"{path}: a Parquet file that is cut off or damaged: {said}", "Download or copy it again."
        ) from error
