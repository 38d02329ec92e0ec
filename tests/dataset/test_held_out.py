"""Posts that are held out: drawn by ids, with their parents, children, siblings and equal pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from kohaku_wrap.cli import run_program
from kohaku_wrap.dataset.held_out import find_relations, hold_out, with_relatives
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.formats.held_out import BadHeldOut, HeldOut
from kohaku_wrap.formats.relations import RELATIONS_FILE, BadRelations, Relations, read_relations, write_relations


def write_columns(folder: Path, captions: list[str], first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(first, first + len(captions), dtype=np.int64)
    sides = np.full(len(ids), 64, dtype=np.int32)
    with (folder / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {}) as writer:
        writer.write(ids, pa.array([f"{each}.png" for each in ids]), sides, sides, pa.array(captions))


def relate(parents: dict[int, int], contents: dict[int, str], last: int) -> Relations:
    ids = np.arange(1, last + 1, dtype=np.int64)
    return Relations(
        ids,
        np.array([parents.get(each, 0) for each in ids.tolist()], dtype=np.int64),
        pa.array([contents.get(each, f"own {each}") for each in ids.tolist()]),
    )


def test_parents_children_siblings_and_equal_pictures_are_taken_out() -> None:
    # 10 has the parent 4 and the children 11, 12; 5 is a sibling; 20 is a sibling by a parent that is not there.
    parents = {10: 4, 5: 4, 11: 10, 12: 10, 20: 99, 21: 99, 13: 11}
    held_out = with_relatives(np.array([10, 20]), relate(parents, {10: "same", 17: "same"}, 25))
    assert held_out.relatives.tolist() == [4, 5, 11, 12, 17, 21]
    assert held_out.by_kind == {"parents": 1, "children": 2, "siblings": 2, "equal pictures": 1}
    assert held_out.unknown == 0 and held_out.images == 25
    assert held_out.left_out.tolist() == [4, 5, 10, 11, 12, 17, 20, 21]


@given(some.data())
def test_relatives_are_those_of_a_plain_search(data: some.DataObject) -> None:
    last = data.draw(some.integers(1, 12))
    posts = some.integers(1, last)
    parents = data.draw(some.dictionaries(posts, some.integers(0, 14)))
    contents = data.draw(some.dictionaries(posts, some.sampled_from(["a", "b", ""])))
    chosen = data.draw(some.sets(posts, min_size=1))
    relations = relate(parents, contents, last)
    content_of = dict(zip(relations.ids.tolist(), relations.contents.to_pylist(), strict=True))
    wanted = set()
    for one in range(1, last + 1):
        for held in chosen:
            mine, other = parents.get(one, 0), parents.get(held, 0)
            alike = content_of[one] and content_of[one] == content_of[held]
            if other == one or mine == held or (mine and mine == other) or alike:
                wanted.add(one)
    found = with_relatives(np.array(sorted(chosen)), relations)
    assert found.relatives.tolist() == sorted(wanted - chosen)
    assert sum(found.by_kind.values()) == len(found.relatives)


def test_posts_follow_from_ids_and_words_alone(tmp_path: Path) -> None:
    captions = [f"1girl ||| a{number} ||| {'safe' if number % 4 else 'explicit'}, newest" for number in range(200)]
    write_columns(tmp_path / "one", captions)
    first = hold_out(tmp_path / "one", "", 20)
    assert len(first.posts) == 20 and not len(first.relatives)
    assert sum((int(post) - 1) % 4 == 0 for post in first.posts) == 5, "a quarter is explicit, of the held-out ones too"
    assert first.unknown == first.images == 200, "nobody wrote down which belong together"
    write_relations(tmp_path / "one", relate({}, {}, 200))
    assert hold_out(tmp_path / "one", "", 20).posts.tolist() == first.posts.tolist()
    assert hold_out(tmp_path / "one", "", 20).unknown == 0


def test_the_list_comes_back_from_its_text() -> None:
    held_out = HeldOut(np.array([3, 9]), np.array([4]), {"parents": 1}, 2, 30)
    again = HeldOut.parse(held_out.text())
    assert again.text() == held_out.text() and again.mark(np.array([3, 4, 5])).tolist() == [True, True, False]
    for text in ("", "[]", held_out.text().replace('"format": 1', '"format": 2'), '{"format": 1}'):
        with pytest.raises(BadHeldOut):
            HeldOut.parse(text)


def test_damaged_relations_are_named(tmp_path: Path) -> None:
    (tmp_path / RELATIONS_FILE).write_bytes(b"no table")
    with pytest.raises(BadRelations, match=r"relations.parquet: cannot be read"):
        read_relations(tmp_path)
    pq.write_table(pa.table({"id": [1]}), tmp_path / RELATIONS_FILE)
    with pytest.raises(BadRelations, match="format None"):
        read_relations(tmp_path)


@pytest.mark.parametrize("has_parents", [True, False])
def test_kwrap_caption_writes_down_parents_and_md5(tmp_path: Path, writer: ModuleType, has_parents: bool) -> None:
    world = writer.make_world(12)
    for post in world.posts:
        post |= {"is_deleted": 0, "is_banned": 0, "file_ext": "png", "md5": f"{post['id']:032x}", "file_url": "u"}
    world.posts[4]["parent_id"], world.posts[5]["parent_id"] = world.posts[1]["id"], world.posts[1]["id"]
    db = writer.write_layout(tmp_path / "a.db", world)
    if not has_parents:
        import sqlite3

        with sqlite3.connect(db) as connection:
            connection.execute("ALTER TABLE post DROP COLUMN parent_id")
    dataset = tmp_path / "mine.toml"
    dataset.write_text("[selection]\n[selection.drop]\nafter_sample = []\n", encoding="utf-8")
    selection, tars, images = tmp_path / "s.parquet", tmp_path / "tars", tmp_path / "images"
    for post in world.posts:
        tars.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (post["id"], 0, 0)).save(tars / f"{post['id']}.png")
    assert run_program(["select", str(dataset), "--db", str(db), "--out", str(selection)]) == 0
    assert run_program(["extract", str(selection), "--tars", str(tars), "--out", str(images)]) == 0
    caption = ["caption", str(selection), "--db", str(db), "--out", str(images), "--dataset", str(dataset)]
    assert run_program(caption) == 0
    ids = np.array([post["id"] for post in world.posts])
    found = find_relations(images, ids)
    assert found.contents.to_pylist() == [post["md5"] for post in world.posts]
    wanted = [post["parent_id"] or 0 for post in world.posts] if has_parents else [-1] * 12
    assert found.parents.tolist() == wanted
    assert find_relations(images, np.array([5000])).parents.tolist() == [-1]


def test_equal_files_of_own_folders_are_alike(tmp_path: Path) -> None:
    own, images = tmp_path / "own", tmp_path / "images"
    own.mkdir()
    for name, colour in (("a", 1), ("b", 2), ("c", 1)):
        Image.new("RGB", (64, 64), (colour * 40, 0, 0)).save(own / f"{name}.png")
        (own / f"{name}.txt").write_text(f"{name}, picture", encoding="utf-8")
    assert run_program(["import", str(own), "--out", str(images)]) == 0
    rows = {row["path"]: row["id"] for row in pq.read_table(images / "imported.parquet").to_pylist()}
    ids = np.array(sorted(rows.values()))
    found = with_relatives(np.array([rows["a.png"]]), find_relations(images, ids))
    assert found.relatives.tolist() == [rows["c.png"]] and found.unknown == 0
    assert json.loads(found.text())["by_kind"]["equal pictures"] == 1
