"""Tags of posts: the same from every layout, in every row order, whatever the chunks."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kohaku_wrap.metadata import relations, spill, streamed
from kohaku_wrap.metadata.chunks import RowsOutOfOrder, TagChunk
from kohaku_wrap.metadata.database import Database, open_database
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.source import DatabaseDamaged
from kohaku_wrap.metadata.tags import NO_TAG, read_tags


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred posts need many chunks and partitions, and are not simply asked for by id."""
    monkeypatch.setattr(streamed, "ROWS_A_BATCH", 300)
    monkeypatch.setattr(relations, "POSTS_A_CHUNK", 37)
    monkeypatch.setattr(relations, "IDS_A_QUERY", 5)
    monkeypatch.setattr(spill, "ROWS_A_PARTITION", 500)


def collect(
    database: Database, wanted: np.ndarray, threads: int = 2, spill_folder: Path | None = None
) -> dict[int, list[int]]:
    """Tag ids by post; checks that the chunks cover every wanted post once, in order."""
    tags = read_tags(database)
    found: dict[int, list[int]] = {}
    expected_first = 0
    for chunk in map_tag_chunks(database, tags, wanted, lambda one: one, threads, spill_folder):
        assert isinstance(chunk, TagChunk)
        assert chunk.first == expected_first < chunk.stop
        expected_first = chunk.stop
        assert (np.diff(chunk.posts) >= 0).all()
        found |= {int(post): [] for post in wanted[chunk.first : chunk.stop]}
        for place, tag in zip(chunk.posts.tolist(), chunk.tags.tolist(), strict=True):
            found[int(wanted[chunk.first + place])].append(int(tags.ids[tag]) if tag != NO_TAG else NO_TAG)
    assert expected_first == len(wanted)
    return found


def count_pieces(database: Database, wanted: np.ndarray, spill_folder: Path) -> int:
    return len(list(map_tag_chunks(database, read_tags(database), wanted, lambda one: one, 2, spill_folder)))


def expected_tags(world: object, wanted: np.ndarray) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {int(post): [] for post in wanted}
    for post, tag in world.relations:  # type: ignore[attr-defined]
        if post in found:
            found[post].append(tag)
    return found


@pytest.mark.parametrize("layout", ["v0-decimal", "v0-base36", "v1", "v2", "v3"])
@pytest.mark.parametrize("share", [1, 4])
def test_every_layout_gives_the_same_tags(tmp_path: Path, writer: ModuleType, layout: str, share: int) -> None:
    world = writer.make_world(300)
    database = open_database(writer.write_layout(tmp_path / "a.db", world, layout, indexed=False))
    wanted = np.array([post["id"] for post in world.posts][::share], dtype=np.int64)
    assert collect(database, wanted) == expected_tags(world, wanted)


@pytest.mark.parametrize("indexed", [False, True])
def test_rows_in_no_order_are_sorted_and_leave_nothing(tmp_path: Path, writer: ModuleType, indexed: bool) -> None:
    world = writer.make_world(300)
    world.relations = writer.shuffled(world.relations)
    database = open_database(writer.write_layout(tmp_path / "a.db", world, indexed=indexed))
    wanted = np.array([post["id"] for post in world.posts][1::2], dtype=np.int64)
    with pytest.raises(RowsOutOfOrder):
        collect(database, wanted)
    folder = tmp_path / "spill"
    assert collect(database, wanted, spill_folder=folder) == expected_tags(world, wanted)
    assert list(folder.iterdir()) == []


def test_a_late_row_of_an_early_post_is_noticed(tmp_path: Path, writer: ModuleType) -> None:
    world = writer.make_world(300)
    world.relations.append((3, world.tags[0][0]))
    database = open_database(writer.write_layout(tmp_path / "a.db", world, indexed=False))
    # The early post is not even near the stretch that the wanted posts lie in.
    wanted = np.array([post["id"] for post in world.posts[:20]], dtype=np.int64)
    with pytest.raises(RowsOutOfOrder):
        collect(database, wanted)
    assert collect(database, wanted, spill_folder=tmp_path) == expected_tags(world, wanted)


def test_interrupted_sort_leaves_nothing(tmp_path: Path, writer: ModuleType) -> None:
    world = writer.make_world(300)
    database = open_database(writer.write_layout(tmp_path / "a.db", world, indexed=False))
    wanted = np.array([post["id"] for post in world.posts], dtype=np.int64)
    folder = tmp_path / "spill"
    chunks = map_tag_chunks(database, read_tags(database), wanted, lambda one: one, 2, folder)
    assert isinstance(chunks, Generator)
    next(chunks)
    chunks.close()
    assert list(folder.iterdir()) == []


def test_few_posts_are_asked_for_by_id(tmp_path: Path, writer: ModuleType) -> None:
    world = writer.make_world(300)
    world.relations = writer.shuffled(world.relations)
    database = open_database(writer.write_layout(tmp_path / "a.db", world, indexed=False))
    wanted = np.array([world.posts[7]["id"], world.posts[250]["id"]], dtype=np.int64)
    assert collect(database, wanted) == expected_tags(world, wanted)


@pytest.mark.parametrize(("key", "is_in_order"), [("tag_id, post_id", False), ("post_id, tag_id", True)])
def test_a_relation_without_rowids(tmp_path: Path, writer: ModuleType, key: str, is_in_order: bool) -> None:
    world = writer.make_world(200)
    world.relations = sorted(set(world.relations), key=lambda row: (row[1], row[0]))
    path = writer.write_layout(tmp_path / "a.db", writer.World(world.posts, world.tags, []), indexed=False)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE posttagrelation")
        connection.execute(f"CREATE TABLE posttagrelation (tag_id, post_id, PRIMARY KEY ({key})) WITHOUT ROWID")
        connection.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", world.relations)
    database = open_database(path)
    wanted = np.array([post["id"] for post in world.posts], dtype=np.int64)
    if is_in_order:
        assert collect(database, wanted) == expected_tags(world, wanted)
    else:
        with pytest.raises(RowsOutOfOrder):
            collect(database, wanted)
    assert collect(database, wanted, spill_folder=tmp_path) == expected_tags(world, wanted)
    assert count_pieces(database, wanted, tmp_path) > 2


def test_rows_of_no_tag_no_post_and_null(tmp_path: Path, writer: ModuleType) -> None:
    world = writer.make_world(40)
    path = writer.write_layout(tmp_path / "a.db", writer.World(world.posts, world.tags, []), indexed=False)
    tag = world.tags[3][0]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE posttagrelation")
        connection.execute("CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER)")
        rows = [(3, tag), (3, None), (None, tag), (3, 99_999_999), (3, -5), (4, tag), (6, tag), (10**9, tag)]
        rows.sort(key=lambda row: row[0] or 3)
        connection.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", rows)
    wanted = np.array([post["id"] for post in world.posts], dtype=np.int64)
    found = collect(open_database(path), wanted)
    assert sorted(found[3]) == [NO_TAG, NO_TAG, tag]
    assert found[6] == [tag]
    assert sum(map(len, found.values())) == 4


def test_rowids_with_wide_gaps(tmp_path: Path, writer: ModuleType) -> None:
    world = writer.make_world(40)
    path = writer.write_layout(tmp_path / "a.db", world, indexed=False)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE posttagrelation SET id = id * 1000000000000 WHERE id > 5")
    wanted = np.array([post["id"] for post in world.posts], dtype=np.int64)
    assert count_pieces(open_database(path), wanted, tmp_path) < 20
    expected = expected_tags(world, wanted)
    assert collect(open_database(path), wanted) == expected
    assert collect(open_database(path), wanted, spill_folder=tmp_path) == expected


@pytest.mark.parametrize("value", ["'x'", "1.5", "x'00ff'"])
@pytest.mark.parametrize("posts", [1, 40])
def test_what_is_no_whole_number_is_damage(tmp_path: Path, writer: ModuleType, value: str, posts: int) -> None:
    world = writer.make_world(40)
    path = writer.write_layout(tmp_path / "a.db", world, indexed=False)
    wanted = np.array([post["id"] for post in world.posts], dtype=np.int64)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"INSERT INTO posttagrelation (post_id, tag_id) VALUES ({wanted[-1]}, {value})")
    with pytest.raises(DatabaseDamaged, match="the column tag_id holds what is no whole number"):
        collect(open_database(path), wanted[-posts:])
