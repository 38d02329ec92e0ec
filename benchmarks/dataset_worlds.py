"""Large made-up databases for the benchmarks, filled within sqlite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from kohaku_wrap.metadata.new_database import POST_COLUMNS, SCHEMA

POOLS = {0: 30_000, 1: 45_000, 2: 20_000, 3: 4_500, 4: 500}
"""Tags by type: general, artist, character, copyright, meta."""

TAGS_OF_POST = {0: 28, 1: 1, 2: 2, 3: 2, 4: 3}
"""Relations of a post by the type of their tags: 36."""

HASH = "((i * 2654435761 + (place + 1) * 2246822519) % 4294967296) / 4294967296.0"
"""A number from 0 to 1 out of a post and the place of its relation."""


def write_posts_database(path: Path, posts: int, relations: bool, indexed: bool) -> None:
    """A database in layout v3 with `posts` posts; a whole one has the name, so an interrupted call starts anew."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(part)) as database:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000;")
        database.executescript(SCHEMA)
        write_tags(database)
        write_posts(database, posts)
        if relations:
            write_relations(database, posts)
        if indexed:
            database.execute("CREATE INDEX posttagrelation_post_id ON posttagrelation (post_id)")
        database.commit()
    part.replace(path)


def write_tags(database: sqlite3.Connection) -> None:
    """All pools one after another."""
    first = 1
    for kind, count in POOLS.items():
        database.execute(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count) "
            "INSERT INTO tag SELECT :first + i, printf('%s_%s_%d', "
            "substr('hairbluelongskirtwhitegreenopenmouth', 1 + i % 30, 3 + i % 5), "
            "substr('ribbonsleevesbackgroundthighhighs', 1 + i % 27, 4 + i % 4), :first + i), :kind, i % 5000 FROM n",
            {"count": count, "first": first, "kind": kind},
        )
        first += count


def write_posts(database: sqlite3.Connection, posts: int) -> None:
    """Posts with ids 1 to `posts`: 5 % deleted, 3 % gold, 4 % without a still image."""
    cdn = "'https://cdn.example.net/{}/ab/cd/' || printf('%032x', i * 7919) || '.jpg'"
    values = dict.fromkeys(POST_COLUMNS, "0") | {
        "id": "i",
        "created_at": "printf('%04d-%02d-%02dT19:16:10.123-04:00', 2005 + i % 20, 1 + i % 12, 1 + i % 28)",
        "uploader_id": "i % 90000",
        "source": "'https://art.example.net/works/' || (i * 31)",
        "md5": "CASE WHEN i % 33 = 0 THEN NULL ELSE printf('%032x', i * 7919) END",
        "parent_id": "NULL",
        "pixiv_id": "i * 13",
        "is_deleted": "i % 20 = 0",
        "image_width": "800 + i % 700",
        "image_height": "900 + i % 900",
        "file_size": "100000 + i % 900000",
        "file_ext": "CASE WHEN i % 25 = 0 THEN 'mp4' WHEN i % 3 = 0 THEN 'png' ELSE 'jpg' END",
        "rating": "i * 7919 % 4",
        "score": "i % 97",
        "fav_count": "(i * 31 % 211) * (i % 3)",
        "file_url": f"CASE WHEN i % 33 = 0 THEN NULL ELSE {cdn.format('original')} END",
        "large_file_url": cdn.format("sample"),
        "preview_file_url": cdn.format("180x180"),
        "updated_at": "'2024-05-19T01:30:25.096-04:00'",
    }
    database.execute(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {posts}) "
        f"INSERT INTO post ({', '.join(values)}) SELECT {', '.join(values.values())} FROM n"
    )


def write_relations(database: sqlite3.Connection, posts: int) -> None:
    """36 relations a post in the order of the posts, frequent tags far more often than rare ones."""
    places = []
    first, place = 1, 0
    for kind, count in POOLS.items():
        for _ in range(TAGS_OF_POST[kind]):
            places.append(f"({place}, {first}, {count})")
            place += 1
        first += count
    database.execute(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {posts}), "
        f"pool(place, first, size) AS (VALUES {', '.join(places)}), "
        f"drawn(i, first, size, u) AS (SELECT i, first, size, {HASH} FROM n CROSS JOIN pool) "
        "INSERT INTO posttagrelation (post_id, tag_id) SELECT i, first + CAST(size * u * u * u AS INTEGER) FROM drawn"
    )
