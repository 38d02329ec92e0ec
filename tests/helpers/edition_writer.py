"""The same posts in every edition that is published, with the traps of each, for tests and benchmarks."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

KINDS = {0: "general", 1: "artist", 2: "character", 3: "copyright", 4: "meta"}
API_COLUMNS = (
    *("id", "created_at", "score", "up_score", "down_score", "fav_count", "source", "md5", "rating", "image_width"),
    *("image_height", "file_ext", "file_size", "parent_id", "is_pending", "is_flagged", "is_deleted", "is_banned"),
    *("tag_string", *(f"tag_string_{kind}" for kind in KINDS.values()), "file_url"),
)
DUMP = ("post", "tag", "posttagrelation", "localpost")

API_SQL = f"""
CREATE TABLE api AS
WITH joined AS (
  SELECT r.post_id, string_agg(t.name, ' ' ORDER BY r.id) AS tag_string, {
    ", ".join(
        f"string_agg(t.name, ' ' ORDER BY r.id) FILTER (WHERE t.type = {number}) AS tag_string_{kind}"
        for number, kind in KINDS.items()
    )
} FROM posttagrelation r JOIN tag t ON t.id = r.tag_id GROUP BY r.post_id
)
SELECT p.id, p.created_at, p.score, p.up_score, p.down_score, p.fav_count, p.source, p.md5,
  (['g', 's', 'q', 'e'])[p.rating + 1] AS rating, p.image_width, p.image_height, p.file_ext, p.file_size, p.parent_id,
  FALSE AS is_pending, FALSE AS is_flagged, p.is_deleted <> 0 AS is_deleted, p.is_banned <> 0 AS is_banned,
  coalesce(j.tag_string, '') AS tag_string,
  {", ".join(f"coalesce(j.tag_string_{kind}, '') AS tag_string_{kind}" for kind in KINDS.values())},
  p.file_url, {{'id': p.id, 'file_ext': p.file_ext, 'variants': [{{'type': 'original', 'width': p.image_width}}]}}
    AS media_asset
FROM post p LEFT JOIN joined j ON j.post_id = p.id
"""
"""Posts with their tags in the order of the relation, as the site's API gives them."""


def load_world(database: Path, rows_a_batch: int = 100_000) -> duckdb.DuckDBPyConnection:
    """The tables of a danbooru2023 sqlite file and `api`, the same posts with API columns, in DuckDB."""
    connection = duckdb.connect()
    with closing(sqlite3.connect(database)) as source:
        for table in DUMP:
            described = source.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchall()
            columns = ", ".join(f'"{name}" {"BIGINT" if kind == "INTEGER" else "VARCHAR"}' for name, kind in described)
            connection.execute(f"CREATE TABLE {table} ({columns})")
            schema = pa.schema([(name, pa.int64() if kind == "INTEGER" else pa.string()) for name, kind in described])
            cursor = source.execute(f"SELECT * FROM {table} ORDER BY rowid")
            while rows := cursor.fetchmany(rows_a_batch):
                arrays = [
                    pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.types, strict=True)
                ]
                fetched = pa.Table.from_arrays(arrays, schema=schema)
                connection.execute(f"INSERT INTO {table} SELECT * FROM fetched")
                del fetched
    connection.execute(API_SQL)
    return connection


def save(world: duckdb.DuckDBPyConnection, query: str, path: Path) -> Path:
    """The rows of a query as a Parquet file, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    world.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 100000)")
    return path


def write_dump(world: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """The tables of danbooru2023 as Parquet files."""
    for table in DUMP:
        save(world, f"SELECT * FROM {table} ORDER BY id", folder / f"{table}.parquet")
    return folder


def write_duckdb(world: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """The tables of danbooru2023 as a DuckDB database."""
    path = folder / "danbooru2023.duckdb"
    path.parent.mkdir(parents=True, exist_ok=True)
    world.execute(f"ATTACH '{path}' AS written")
    for table in DUMP:
        world.execute(f"CREATE TABLE written.{table} AS SELECT * FROM {table} ORDER BY id")
    world.execute("DETACH written")
    return path


def write_snapshot(world: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """2026: one file by ascending id; `is_deleted` NULL where it is not true."""
    columns = "* REPLACE (CASE WHEN is_deleted THEN TRUE END AS is_deleted)"
    return save(world, f"SELECT {columns} FROM api ORDER BY id", folder / "posts-snapshot.parquet")


def write_metadata_2024(world: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """2024: the id is the index of pandas and does not ascend; the moment has a type of its own, in UTC."""
    query = "SELECT * EXCLUDE (id), id AS __index_level_0__ FROM api ORDER BY hash(id)"
    return save(world, query, folder / "metadata.parquet")


def write_shards_2025(world: duckdb.DuckDBPyConnection, folder: Path, shards: int = 3) -> Path:
    """2025: several files, dates as moments in UTC."""
    for number in range(shards):
        query = (
            "SELECT * REPLACE (TRY_CAST(created_at AS TIMESTAMPTZ) AS created_at) FROM api "
            f"WHERE id * {shards} // (SELECT max(id) + 1 FROM api) = {number} ORDER BY id"
        )
        save(world, query, folder / f"train-{number:05d}-of-{shards:05d}.parquet")
    return folder


def write_shards_2026(world: duckdb.DuckDBPyConnection, folder: Path, shards: int = 10) -> Path:
    """2026, put up again: ten files, every twentieth post a second time with later numbers, no `is_deleted`."""
    again = "SELECT * REPLACE (score + 1000 AS score, fav_count + 1000 AS fav_count) FROM api WHERE id % 20 = 1"
    rows = f"SELECT *, 0 AS later FROM api UNION ALL SELECT *, 1 AS later FROM ({again})"
    for number in range(shards):
        # A second row stands in the last files, behind the first one.
        query = (
            f"SELECT * EXCLUDE (later, is_deleted) FROM ({rows}) "
            f"WHERE later * {shards - 1} + (1 - later) * (id % ({shards} - 1)) = {number} ORDER BY later, id"
        )
        save(world, query, folder / f"data-{number}.parquet")
    return folder


def write_tags_only(world: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """2024: other names for the columns of tags, lists instead of words; all else as in the API."""
    names = ", ".join(f"string_split_regex(trim(tag_string_{kind}), ' +') AS {kind}" for kind in KINDS.values())
    gone = ", ".join(["tag_string", *(f"tag_string_{kind}" for kind in KINDS.values())])
    return save(world, f"SELECT * EXCLUDE ({gone}), {names} FROM api ORDER BY id", folder / "tags.parquet")


def write_sqlite_api(world: duckdb.DuckDBPyConnection, folder: Path, where: str = "TRUE") -> Path:
    """Posts of `where` with API columns in sqlite."""
    path = folder / "posts.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(API_COLUMNS)
    reader = world.sql(f"SELECT {names} FROM api WHERE {where} ORDER BY id").to_arrow_reader(50_000)
    with closing(sqlite3.connect(path)) as database, database:
        columns = ", ".join("id INTEGER PRIMARY KEY" if name == "id" else name for name in API_COLUMNS)
        database.execute(f"CREATE TABLE posts ({columns})")
        for batch in reader:
            values = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            database.executemany(f"INSERT INTO posts VALUES ({', '.join('?' * len(API_COLUMNS))})", values)
    return path


def write_whole_tags(world: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """Tags in one column without categories, with the site's own table of tags beside it."""
    gone = ", ".join(f"tag_string_{kind}" for kind in KINDS.values())
    save(world, "SELECT id, name, ([0, 1, 4, 3, 5])[type + 1] AS category FROM tag", folder / "tags" / "tags.parquet")
    return save(world, f"SELECT * EXCLUDE ({gone}) FROM api ORDER BY id", folder / "posts.parquet")


def write_sidecars(world: duckdb.DuckDBPyConnection, folder: Path, limit: int = 1000) -> Path:
    """One JSON file a post, as gallery-dl writes beside the images."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in API_COLUMNS if name != "source"]
    for row in world.execute(f"SELECT {', '.join(names)} FROM api ORDER BY id LIMIT {limit}").fetchall():
        post: Mapping[str, Any] = dict(zip(names, row, strict=True))
        sidecar = folder / f"{post['id'] % 7}" / f"danbooru_{post['id']}.{post['file_ext']}.json"
        sidecar.parent.mkdir(exist_ok=True)
        sidecar.write_text(json.dumps({**post, "category": "danbooru", "tags": post["tag_string"].split()}))
    return folder


EDITIONS: Mapping[str, Callable[[duckdb.DuckDBPyConnection, Path], Path]] = {
    "dump": write_dump,
    "duckdb": write_duckdb,
    "snapshot-2026": write_snapshot,
    "metadata-2024": write_metadata_2024,
    "shards-2025": write_shards_2025,
    "shards-2026": write_shards_2026,
    "tags-only-2024": write_tags_only,
    "sqlite-api": write_sqlite_api,
}
"""Editions by name; `write_whole_tags` needs `--tags`, `write_sidecars` is for few posts."""
