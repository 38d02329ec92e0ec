"""Filters, favourites and posts by tag."""

from __future__ import annotations

import datetime
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kohaku_wrap.dataset.recipe import RANGES
from kohaku_wrap.dataset.years import read_iso_year
from kohaku_wrap.metadata import filters
from kohaku_wrap.metadata.database import Database, open_database
from kohaku_wrap.metadata.description import describe_database
from kohaku_wrap.metadata.posts import (
    UNKNOWN_NUMBER,
    count_favourites,
    posts_with_tags,
    read_drops,
    read_posts,
)
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.source import DatabaseDamaged
from kohaku_wrap.metadata.tags import UnknownTags, read_tags


@pytest.fixture
def world(writer: ModuleType) -> Any:
    return writer.make_world(200)


@pytest.fixture(params=["v0-base36", "v3"])
def database(request: pytest.FixtureRequest, tmp_path: Path, writer: ModuleType, world: Any) -> Database:
    return open_database(writer.write_layout(tmp_path / "a.db", world, request.param))


def dropped_by(database: Database, one: filters.Filter) -> set[int]:
    ids, drops, *_ = read_drops(database, [one])
    return set(ids[drops == 1].tolist())


STILL = {"jpg", "jpeg", "png", "webp", "avif"}


def test_flags_drop_what_they_say(database: Database, world: Any) -> None:
    rules = {
        "deleted": lambda post: post["is_deleted"],
        "gold": lambda post: not post["md5"] or not post["file_url"],
        "banned": lambda post: post["is_banned"],
        "no_still_image": lambda post: post["file_ext"] not in STILL,
    }
    assert set(rules) == set(filters.FLAGS)
    for name, rule in rules.items():
        expected = {post["id"] for post in world.posts if rule(post)}
        assert expected and dropped_by(database, filters.flag_filter(name)) == expected
    description = describe_database(database.path)
    assert description.would_drop == {
        name: sum(bool(rule(post)) for post in world.posts) for name, rule in rules.items()
    }


@pytest.mark.parametrize(
    ("made", "keeps"),
    [
        (filters.range_filter("score", "score", 5, None), lambda post: post["score"] >= 5),
        (filters.range_filter("score", "score", None, -3), lambda post: post["score"] <= -3),
        (filters.range_filter("fav_count", "fav_count", 2, 90), lambda post: 2 <= post["fav_count"] <= 90),
        (filters.rating_filter("ratings", ["general", "explicit"]), lambda post: post["rating"] in (0, 3)),
        (filters.extension_filter("extensions", [".PNG", "webp"]), lambda post: post["file_ext"] in ("png", "webp")),
        (
            filters.range_filter("pixels", "image_width * image_height", 400_000, None),
            lambda post: post["image_width"] * post["image_height"] >= 400_000,
        ),
        (
            filters.date_filter("date", datetime.date(2010, 1, 1), datetime.date(2019, 6, 30)),
            lambda post: "2010-01-01" <= post["created_at"][:10] <= "2019-06-30" and read_iso_year(post["created_at"]),
        ),
    ],
)
def test_conditions_drop_the_rest(database: Database, world: Any, made: filters.Filter, keeps: Any) -> None:
    expected = {post["id"] for post in world.posts if not keeps(post)}
    assert 0 < len(expected) < len(world.posts)
    assert dropped_by(database, made) == expected


def test_favourites_by_rating(database: Database, world: Any) -> None:
    counts = count_favourites(database)
    for rating in range(4):
        expected = Counter(post["fav_count"] for post in world.posts if post["rating"] == rating)
        assert dict(zip(*(column.tolist() for column in counts[rating]), strict=True)) == expected


def test_posts_by_tag(database: Database, world: Any) -> None:
    tags = [tag[0] for tag in world.tags[:9]]
    found = posts_with_tags(database, read_tags(database), tags)
    for tag in tags:
        assert found[tag].tolist() == sorted({post for post, one in world.relations if one == tag})


def test_posts_come_as_asked(database: Database, world: Any) -> None:
    wanted = np.array([3, 9, 300, 601], dtype=np.int64)
    rows = [row for batch in read_posts(database, wanted) for row in batch.to_pylist()]
    by_id = {post["id"]: post for post in world.posts}
    assert [row["id"] for row in rows] == [3, 9, 300]
    for row in rows:
        post = by_id[row["id"]]
        for name in ("rating", "fav_count", "score", "created_at", "file_ext", "image_width", "image_height"):
            assert row[name] == post[name]
        assert row["md5"] == (post["md5"] or "")


def test_unknown_tags_are_named_with_the_nearest(database: Database) -> None:
    with pytest.raises(UnknownTags, match=r"long_hiar' \(did you mean 'long_hair'\?\)"):
        read_tags(database).find_names(["solo", "long_hiar"], "tags_all")
    with pytest.raises(UnknownTags, match="did you mean 'blue_eyes'"):
        read_tags(database).find_names(["blue eyes"], "tags_all")


def test_digest_follows_the_content_not_the_copy(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    plain = open_database(writer.write_layout(tmp_path / "a.db", world, "v2", indexed=False))
    indexed = open_database(writer.write_layout(tmp_path / "b.db", world, "v2"))
    assert plain.digest() == indexed.digest()
    world.relations.append((600, world.tags[0][0]))
    other = open_database(writer.write_layout(tmp_path / "c.db", world, "v2"))
    assert other.digest() != plain.digest()


def test_description_counts(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    world.posts[0]["rating"] = 9
    world.tags[0] = (*world.tags[0][:2], 77, 0)
    description = describe_database(writer.write_layout(tmp_path / "a.db", world, "v1", indexed=False))
    dates = sorted(post["created_at"][:10] for post in world.posts if post["created_at"][4:5] == "-")
    assert description.layout == "v1" and description.token_base is None
    assert (description.posts, description.relations) == (200, len(world.relations))
    assert (description.first_id, description.last_id) == (3, 600)
    assert (description.first_date, description.last_date) == (dates[0], dates[-1])
    assert description.ratings["unknown"] == 1 and sum(description.ratings.values()) == 200
    assert description.tag_types["unknown"] == 1 and sum(description.tag_types.values()) == len(world.tags)
    assert sum(description.extensions.values()) == 200
    assert description.indexes == ("tag.name",)


def test_no_post_is_without_an_id(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    path = writer.write_layout(tmp_path / "a.db", world)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE other AS SELECT * FROM post")
        connection.execute("UPDATE other SET id = NULL WHERE id = 30")
        connection.execute("DROP TABLE post")
        connection.execute("ALTER TABLE other RENAME TO post")
    with pytest.raises(DatabaseDamaged, match="no whole number"):
        read_drops(open_database(path), [])


def test_texts_that_are_no_utf8_are_read(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    path = writer.write_layout(tmp_path / "a.db", world)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE post SET created_at = CAST(x'66ff' AS TEXT), file_ext = CAST(x'fe' AS TEXT)")
        connection.execute("UPDATE tag SET name = CAST(x'61ff62' AS TEXT) WHERE id = 1")
    database = open_database(path)
    assert "a\ufffdb" in read_tags(database).names
    batch = next(read_posts(database, np.array([3], dtype=np.int64)))
    assert batch.column("created_at").to_pylist() == ["f\ufffd"] and batch.column("file_ext").to_pylist() == ["\ufffd"]
    description = describe_database(path)
    assert description.unknown_dates == 200 and dict(description.extensions) == {"\ufffd": 200}


def test_dates_are_read_as_captions_read_them(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    dates = ["2016-02-30", "2016-13-01", "20160101T000000", "2016-1-1", "now", "", "x", "2016-02-29T00:00:00"]
    for post, date in zip(world.posts, dates, strict=False):
        post["created_at"] = date
    path = writer.write_layout(tmp_path / "a.db", world)
    unreadable = {post["id"] for post in world.posts if not read_iso_year(post["created_at"])}
    assert describe_database(path).unknown_dates == len(unreadable)
    assert dropped_by(open_database(path), filters.date_filter("date", None, datetime.date.max)) == unreadable


def test_numbers_beyond_32_bits_do_not_wrap_around(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    world.posts[0] |= {"fav_count": 1 << 32, "score": -(1 << 32), "image_width": (1 << 33) + 1, "image_height": 7}
    database = open_database(writer.write_layout(tmp_path / "a.db", world))
    row = next(read_posts(database, np.array([3], dtype=np.int64))).to_pylist()[0]
    largest = (1 << 31) - 1
    assert (row["fav_count"], row["score"], row["image_width"], row["image_height"]) == (
        largest, -largest - 1, largest, 7,
    )  # fmt: skip


YES = (1, 1.0, "1", " 1\r", "1.0", "t", "T", "true", "TRUE", "True", "y", "yes", "on")
NO = (0, 0.0, "0", "0.0", "f", "F", "false", "False", "FALSE", "n", "No", " off ")
UNKNOWN_FLAGS = (2, -1, 0.5, float("nan"), "2", None, "", " ", "NULL", "nan", "maybe", b"\x01", "1x")
NUMBERS = {5: 5, 6.0: 6, "5": 5, " 7\r": 7, "-3": -3, "5.0": 5, "12345678901": (1 << 31) - 1}
NO_NUMBERS = (None, "", " ", "abc", "NULL", "5abc", "5.5", 5.5, "1e3", "1,234", float("inf"), b"5", "0x10", "٣")


def set_values(path: Path, column: str, values: Any, text_columns: bool) -> list[int]:
    """Put `values` into `column` of the first posts; with every column declared TEXT, as an import of CSV makes it."""
    with closing(sqlite3.connect(path)) as connection, connection:
        names = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info('post')")]
        if text_columns:
            kinds = ", ".join(f"{name} {'INTEGER PRIMARY KEY' if name == 'id' else 'TEXT'}" for name in names)
        else:
            kinds = ", ".join(f"{name} {'INTEGER PRIMARY KEY' if name == 'id' else ''}" for name in names)
        connection.execute(f"CREATE TABLE other ({kinds})")
        connection.execute("INSERT INTO other SELECT * FROM post ORDER BY id")
        connection.execute("DROP TABLE post")
        connection.execute("ALTER TABLE other RENAME TO post")
        ids = [post for (post,) in connection.execute("SELECT id FROM post ORDER BY id LIMIT ?", (len(values),))]
        connection.executemany(f"UPDATE post SET {column} = ? WHERE id = ?", zip(values, ids, strict=True))
    return ids


@pytest.mark.parametrize("text_columns", [False, True])
@pytest.mark.parametrize("column", ["is_deleted", "is_banned"])
def test_flags_are_read_as_dumps_write_them(
    tmp_path: Path, writer: ModuleType, world: Any, column: str, text_columns: bool
) -> None:
    path = writer.write_layout(tmp_path / "a.db", world)
    values = (*YES, *NO, *UNKNOWN_FLAGS)
    ids = set_values(path, column, values, text_columns)
    made = filters.flag_filter(column.removeprefix("is_"))
    read, bits, *_ = read_drops(open_database(path), [made, filters.Filter("unknown", made.unknown)])
    found = dict(zip(read.tolist(), bits.tolist(), strict=True))
    expected = [1] * len(YES) + [0] * len(NO) + [2] * len(UNKNOWN_FLAGS)
    assert [(value, found[post]) for value, post in zip(values, ids, strict=True)] == list(
        zip(values, expected, strict=True)
    )
    assert describe_database(path).unknown[column] == len(UNKNOWN_FLAGS)


@pytest.mark.parametrize("text_columns", [False, True])
@pytest.mark.parametrize("column", ["score", "fav_count", "image_width", "rating"])
def test_what_is_no_number_is_unknown(
    tmp_path: Path, writer: ModuleType, world: Any, column: str, text_columns: bool
) -> None:
    path = writer.write_layout(tmp_path / "a.db", world)
    values = [*NUMBERS, *NO_NUMBERS]
    ids = set_values(path, column, values, text_columns)
    database = open_database(path)
    rows = {
        row["id"]: row[column] for batch in read_posts(database, np.array(ids)) for row in batch.to_pylist()
    }  # fmt: skip
    unknown = {"image_width": 0, "rating": -1}.get(column, UNKNOWN_NUMBER)
    assert [rows[post] for post in ids[len(NUMBERS) :]] == [unknown] * len(NO_NUMBERS)
    if column == "rating":
        assert [rows[post] for post in ids[: len(NUMBERS)]] == [-1] * len(NUMBERS)
        return
    wanted = [0 if column == "image_width" and number < 0 else number for number in NUMBERS.values()]
    assert [rows[post] for post in ids[: len(NUMBERS)]] == wanted
    condition = column.removeprefix("image_")
    for limits in ((-100, None), (None, 1 << 40)):
        made = filters.range_filter(condition, RANGES[condition], *limits)
        assert set(ids[len(NUMBERS) :]) <= dropped_by(database, made)
    described = describe_database(path).unknown[column]
    assert described == len(NO_NUMBERS) + (column == "image_width")


@pytest.mark.parametrize("text_columns", [False, True])
def test_favourites_that_are_no_number_move_no_cutoff(
    tmp_path: Path, writer: ModuleType, world: Any, text_columns: bool
) -> None:
    path = writer.write_layout(tmp_path / "a.db", world)
    ids = set_values(path, "fav_count", list(NO_NUMBERS), text_columns)
    counts = count_favourites(open_database(path))
    known = [post for post in world.posts if post["id"] not in ids]
    for rating in range(4):
        expected = Counter(post["fav_count"] for post in known if post["rating"] == rating)
        assert dict(zip(*(column.tolist() for column in counts[rating]), strict=True)) == expected


def test_tags_with_odd_numbers(tmp_path: Path, writer: ModuleType, world: Any) -> None:
    path = writer.write_layout(tmp_path / "a.db", world)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE other (id TEXT, name TEXT, type TEXT, popularity TEXT)")
        connection.execute("INSERT INTO other SELECT * FROM tag")
        connection.execute("INSERT INTO other VALUES ('', 'no id', '0', '5'), ('x', 'word', '0', '5')")
        connection.execute("UPDATE other SET type = '', popularity = 'many' WHERE name = 'wlop'")
        connection.execute("DROP TABLE tag")
        connection.execute("ALTER TABLE other RENAME TO tag")
    tags = read_tags(open_database(path))
    assert tags.ids.tolist() == sorted(tag[0] for tag in world.tags)
    odd = tags.row_of_name["wlop"]
    assert (tags.types[odd], tags.popularity[odd]) == (-1, 0)
    assert describe_database(path).tag_types["unknown"] == 1


def read_everything(database: Database, tags: list[int]) -> list[Any]:
    """All that is read of posts, as plain values."""
    found = read_drops(database, [filters.flag_filter(name) for name in filters.FLAGS])
    table = read_tags(database)
    chunks = map_tag_chunks(database, table, found.ids, lambda one: (one.posts + one.first, one.tags), 1, None)
    return [
        (found.ids.tolist(), found.drops.tolist()),
        [row for batch in read_posts(database, found.ids) for row in batch.to_pylist()],
        {rating: [column.tolist() for column in some] for rating, some in count_favourites(database).items()},
        {tag: ids.tolist() for tag, ids in posts_with_tags(database, table, tags).items()},
        [(posts.tolist(), some.tolist()) for posts, some in chunks],
    ]


@pytest.mark.parametrize("again", [0, 9])
def test_of_rows_of_one_id_the_first_counts_in_sqlite_too(database: Database, world: Any, again: int) -> None:
    tags = sorted({tag for _, tag in world.relations})[:20]
    plain = read_everything(database, tags)
    with closing(sqlite3.connect(database.path)) as connection, connection:
        (definition,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'post'").fetchone()
        connection.execute("ALTER TABLE post RENAME TO old")
        # Without later rows: a table that keeps ids apart without rowids.
        connection.execute(definition.replace("PRIMARY KEY", "") if again else f"{definition} WITHOUT ROWID")
        connection.execute("INSERT INTO post SELECT * FROM old ORDER BY id DESC")
        connection.execute(
            f"INSERT INTO post SELECT * FROM old ORDER BY id % 7, id LIMIT {again}",
        )
        later = "WHERE rowid IN (SELECT max(rowid) FROM post GROUP BY id HAVING count(*) > 1)" if again else "WHERE 0"
        connection.execute(f"UPDATE post SET is_deleted = 1 - is_deleted, fav_count = 5555, rating = 3 {later}")
        if "tag_list" in definition:
            (longest,) = connection.execute("SELECT max(tag_list) FROM old").fetchone()
            connection.execute(f"UPDATE post SET tag_list = ? {later}", (longest,))
        connection.execute("DROP TABLE old")
    repeated = open_database(database.path)
    assert read_everything(repeated, tags) == plain
    assert read_drops(repeated, []).duplicates == again
    described = describe_database(database.path)
    assert (described.posts, described.duplicate_ids) == (len(world.posts), again)
