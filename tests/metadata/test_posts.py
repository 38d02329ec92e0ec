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

from kohaku_wrap.dataset.years import read_iso_year
from kohaku_wrap.metadata import filters
from kohaku_wrap.metadata.database import Database, DatabaseDamaged, open_database
from kohaku_wrap.metadata.description import describe_database
from kohaku_wrap.metadata.posts import count_favourites, database_digest, posts_with_tags, read_drops, read_posts
from kohaku_wrap.metadata.tags import UnknownTags, read_tags


@pytest.fixture
def world(writer: ModuleType) -> Any:
    return writer.make_world(200)


@pytest.fixture(params=["v0-base36", "v3"])
def database(request: pytest.FixtureRequest, tmp_path: Path, writer: ModuleType, world: Any) -> Database:
    return open_database(writer.write_layout(tmp_path / "a.db", world, request.param))


def dropped_by(database: Database, one: filters.Filter) -> set[int]:
    ids, drops = read_drops(database, [one])
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
    found = posts_with_tags(database, tags)
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
    assert database_digest(plain) == database_digest(indexed)
    world.relations.append((600, world.tags[0][0]))
    other = open_database(writer.write_layout(tmp_path / "c.db", world, "v2"))
    assert database_digest(other) != database_digest(plain)


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
