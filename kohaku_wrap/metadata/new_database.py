"""Write a small metadata database in layout v3, as the demo and the tests need it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

POST_COLUMNS: dict[str, str] = {
    "id": "INTEGER NOT NULL PRIMARY KEY",
    "created_at": "VARCHAR(255) NOT NULL",
    "uploader_id": "INTEGER NOT NULL",
    "source": "VARCHAR(255) NOT NULL",
    "md5": "VARCHAR(255)",
    "parent_id": "INTEGER",
    "has_children": "INTEGER NOT NULL",
    "is_deleted": "INTEGER NOT NULL",
    "is_banned": "INTEGER NOT NULL",
    "pixiv_id": "INTEGER",
    "has_active_children": "INTEGER NOT NULL",
    "bit_flags": "INTEGER NOT NULL",
    "has_large": "INTEGER NOT NULL",
    "has_visible_children": "INTEGER NOT NULL",
    "image_width": "INTEGER NOT NULL",
    "image_height": "INTEGER NOT NULL",
    "file_size": "INTEGER NOT NULL",
    "file_ext": "VARCHAR(255) NOT NULL",
    "rating": "INTEGER NOT NULL",
    "score": "INTEGER NOT NULL",
    "up_score": "INTEGER NOT NULL",
    "down_score": "INTEGER NOT NULL",
    "fav_count": "INTEGER NOT NULL",
    "file_url": "VARCHAR(255)",
    "large_file_url": "VARCHAR(255)",
    "preview_file_url": "VARCHAR(255)",
    "updated_at": "VARCHAR(255)",
}
"""The post table of layout v3 (June 2024 on), column by column."""

SCHEMA = f"""
CREATE TABLE post ({", ".join(f'"{name}" {kind}' for name, kind in POST_COLUMNS.items())});
CREATE TABLE tag (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255) NOT NULL UNIQUE, type INTEGER NOT NULL,
                  popularity INTEGER NOT NULL);
CREATE TABLE posttagrelation (id INTEGER NOT NULL PRIMARY KEY, post_id INTEGER NOT NULL, tag_id INTEGER NOT NULL);
CREATE TABLE localpost (id INTEGER NOT NULL PRIMARY KEY, filepath VARCHAR(255), latentpath VARCHAR(255),
                        post_id INTEGER NOT NULL);
"""

INDEXES = """
CREATE INDEX tag_name ON tag (name);
CREATE INDEX posttagrelation_post_id ON posttagrelation (post_id);
CREATE INDEX posttagrelation_tag_id ON posttagrelation (tag_id);
"""


def write_new_database(
    path: Path,
    posts: Iterable[Mapping[str, Any]],
    tags: Iterable[tuple[int, str, int, int]],
    relations: Iterable[tuple[int, int]],
    indexed: bool = True,
) -> None:
    """Write a database at `path`, which must not exist.

    `posts`: values by column name, all columns of POST_COLUMNS. `tags`: id, name, type, popularity.
    `relations`: post id and tag id, in row order. `indexed`: with the indexes of the published file, or with none.
    """
    names = ", ".join(f'"{name}"' for name in POST_COLUMNS)
    values = ", ".join(f":{name}" for name in POST_COLUMNS)
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(SCHEMA)
        database.executemany(f"INSERT INTO post ({names}) VALUES ({values})", posts)
        database.executemany("INSERT INTO tag VALUES (?, ?, ?, ?)", tags)
        database.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", relations)
        if indexed:
            database.executescript(INDEXES)
