"""Recognising databases: layouts, and one clear error for each part that is missing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
from database_writer import listing

from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.opening import open_metadata
from kohaku_wrap.metadata.posts import read_drops
from kohaku_wrap.metadata.sqlite_files import DatabaseMissing

EXPECTED = {
    "v0-decimal": ("v0", 10),
    "v0-base36": ("v0", 36),
    "v1": ("v1", 0),
    "v2": ("v2", 0),
    "v3": ("v3", 0),
}


@pytest.mark.parametrize("layout", list(EXPECTED))
def test_layout_is_recognised_whatever_the_name(tmp_path: Path, writer: ModuleType, layout: str) -> None:
    path = writer.write_layout(tmp_path / "v1 & 50%?.sqlite", writer.make_world(30), layout)
    before = listing(tmp_path)
    database = open_database(path)
    assert (database.layout.value, database.token_base) == EXPECTED[layout]
    assert len(read_drops(database, [])[0]) == 30
    assert listing(tmp_path) == before


@pytest.mark.parametrize("layout", ["v0-decimal", "v0-base36"])
def test_token_base_is_found_among_digits_alone(tmp_path: Path, writer: ModuleType, layout: str) -> None:
    base = EXPECTED[layout][1]
    texts = ["1", "9", "10", "14", "22"]
    tags = [(int(text, base), f"tag_{text}", number % 5, 1) for number, text in enumerate(texts)]
    world = writer.World([writer.make_post(1)], tags, [(1, tag[0]) for tag in tags])
    assert open_database(writer.write_layout(tmp_path / "a.db", world, layout)).token_base == base


def test_unknown_tables_are_ignored(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(5))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE post_extra (x)")
    assert open_database(path).layout.value == "v3"


def test_every_missing_part_is_named_at_once(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(5), indexed=False)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ALTER TABLE post DROP COLUMN fav_count")
        connection.execute("ALTER TABLE post DROP COLUMN md5")
        connection.execute("DROP TABLE tag")
    with pytest.raises(ProblemsFound) as caught:
        open_database(path)
    told = [(problem.where, problem.what) for problem in caught.value.problems]
    assert told == [("post.md5", "no such column"), ("post.fav_count", "no such column"), ("tag", "no such table")]


def test_missing_relation_and_lists_name_the_table(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(5), indexed=False)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE posttagrelation")
    with pytest.raises(ProblemsFound, match="posttagrelation  no such table"):
        open_database(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DatabaseMissing, match="no such file"):
        open_metadata(tmp_path / "none.db")


def test_views_of_tables_give_the_same(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(60))
    recipe = tmp_path / "all.toml"
    recipe.write_text("[selection]\n[selection.drop]\nafter_sample = ['deleted', 'gold']\n")
    captions = []
    for name in ("plain", "views"):
        selection = tmp_path / f"{name}.parquet"
        select_posts(open_database(path), load_dataset(str(recipe)), selection)
        out = tmp_path / name
        for command in (["caption", selection, "--db", path, "--out", out, "--format", "jsonl"],):
            subprocess.run([sys.executable, "-m", "kohaku_wrap", *map(str, command)], check=True, capture_output=True)
        captions.append((out / "captions.jsonl").read_text().replace(f"/{name}/", "/"))
        with closing(sqlite3.connect(path)) as connection, connection:
            for table in ("post", "tag", "posttagrelation"):
                if name == "plain":
                    connection.execute(f"ALTER TABLE {table} RENAME TO real_{table}")
                    connection.execute(f"CREATE VIEW {table} AS SELECT * FROM real_{table}")
    assert captions[0] == captions[1] and open_database(path).has_views


@pytest.mark.parametrize("layout", ["v0-decimal", "v3"])
def test_ids_of_text_are_named_with_what_to_do(tmp_path: Path, writer: ModuleType, layout: str) -> None:
    """As sqlite's own import of a CSV file makes them: every column TEXT."""
    path = writer.write_layout(tmp_path / "whole.db", writer.make_world(5), layout)
    text = tmp_path / "text.db"
    with closing(sqlite3.connect(text)) as connection, connection:
        connection.execute("ATTACH ? AS whole", (str(path),))
        tables = ["post", "tag"] if layout.startswith("v0") else ["post", "tag", "posttagrelation"]
        for table in tables:
            names = [name for (name,) in connection.execute("SELECT name FROM whole.pragma_table_info(?)", (table,))]
            connection.execute(f"CREATE TABLE {table} ({', '.join(f'{name} TEXT' for name in names)})")
            connection.execute(f"INSERT INTO {table} SELECT * FROM whole.{table}")
    with pytest.raises(ProblemsFound) as found:
        open_database(text)
    told = [problem.where for problem in found.value.problems]
    assert told == ["post.id", *(["posttagrelation.post_id", "posttagrelation.tag_id"] * (layout == "v3"))]
    assert "holds text ('" in found.value.problems[0].what and "CAST(id AS INTEGER)" in found.value.next_step
    with closing(sqlite3.connect(text)) as connection, connection:
        for table in tables:
            names = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]
            numbers = [f"CAST({each} AS INTEGER) AS {each}" if each.endswith("id") else each for each in names]
            connection.execute(f"CREATE TABLE new AS SELECT {', '.join(numbers)} FROM {table}")
            connection.execute(f"DROP TABLE {table}")
            connection.execute(f"ALTER TABLE new RENAME TO {table}")
    assert len(read_drops(open_database(text), [])[0]) == 5
