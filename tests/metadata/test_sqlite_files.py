"""Sqlite files: nothing is written beside them, and one clear error for each thing that can be wrong."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
from database_writer import listing

from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.posts import read_drops
from kohaku_wrap.metadata.source import DatabaseDamaged
from kohaku_wrap.metadata.sqlite_files import DatabaseLocked, DatabaseUnreadable, NotADatabase
from kohaku_wrap.metadata.tags import read_tags


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n" * 9, os.urandom(9000)])
def test_wrong_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.db"
    path.write_bytes(content)
    with pytest.raises(NotADatabase, match="not a sqlite database"):
        open_database(path)


def test_truncated_file_is_told_before_anything_is_read(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(400))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatabaseDamaged, match="cut off"):
        open_database(path)


def test_overwritten_pages_are_damage(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(400), indexed=False)
    content = bytearray(path.read_bytes())
    content[8192:-4096] = b"\xff" * (len(content) - 8192 - 4096)
    path.write_bytes(content)
    with pytest.raises(DatabaseDamaged, match="damaged or cut off"):
        read_drops(open_database(path), [])


def test_locked_by_a_writer(tmp_path: Path, writer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kohaku_wrap.metadata.sqlite_files.LOCK_TIMEOUT_SECONDS", 0.1)
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(5))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseLocked, match="locked by another program"):
            open_database(path)


def test_interrupted_write_is_told(tmp_path: Path, writer: ModuleType) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(200))
    crash = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN'); c.execute('UPDATE post SET score = score + 1')\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", crash, str(path)], check=True)
    assert path.with_name("a.db-journal").stat().st_size
    with pytest.raises(DatabaseUnreadable, match="rollback journal"):
        open_database(path)


class TestWal:
    """Databases in WAL mode; the last post is only in the WAL."""

    def posts(self, path: Path) -> int:
        return len(read_drops(open_database(path), [])[0])

    @pytest.fixture
    def live(self, tmp_path: Path, writer: ModuleType) -> Path:
        folder = tmp_path / "live"
        folder.mkdir()
        world = writer.make_world(20)
        late = world.posts.pop()
        path: Path = writer.write_layout(folder / "a.db", world)
        self.connection = sqlite3.connect(path)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA wal_autocheckpoint = 0")
        columns = ", ".join(late)
        marks = ", ".join(f":{name}" for name in late)
        self.connection.execute(f"INSERT INTO post ({columns}) VALUES ({marks})", late)
        self.connection.commit()
        return path

    def test_wal_of_a_live_writer_is_honoured(self, live: Path) -> None:
        before = set(listing(live.parent))
        assert self.posts(live) == 20
        assert set(listing(live.parent)) == before

    def test_wal_without_its_index_is_honoured_and_nothing_is_written(self, live: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("a.db", "a.db-wal"):
            shutil.copy(live.with_name(name), copy / name)
        before = listing(copy)
        assert self.posts(copy / "a.db") == 20
        assert len(read_tags(open_database(copy / "a.db"))) > 0
        assert listing(copy) == before

    def test_closed_wal_database_stays_one_file(self, live: Path) -> None:
        self.connection.close()
        assert set(listing(live.parent)) == {"a.db"}
        assert self.posts(live) == 20
        assert set(listing(live.parent)) == {"a.db"}


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT "


ENDLESS_VIEWS = {
    "post": ENDLESS + "x AS id, {} FROM n",
    "post without a row": ENDLESS + "x AS id, {} FROM n WHERE x < 0",
    "tag": ENDLESS + "x AS id, 'a' || x AS name, 0 AS type, 1 AS popularity FROM n",
    "posttagrelation": ENDLESS + "x AS id, 3 AS post_id, x AS tag_id FROM n",
    "relation of everything": "SELECT 3 AS post_id, a.id AS tag_id FROM tag a, tag b, tag c, tag d, tag e, tag f",
}


@pytest.mark.parametrize("name", ENDLESS_VIEWS)
def test_an_endless_view_ends_in_a_message(tmp_path: Path, writer: ModuleType, name: str) -> None:
    path = writer.write_layout(tmp_path / "a.db", writer.make_world(20))
    table = "posttagrelation" if name.startswith("relation") else name.split()[0]
    with closing(sqlite3.connect(path)) as connection, connection:
        columns = [column for (column,) in connection.execute("SELECT name FROM pragma_table_info('post')")]
        values = ", ".join(f"1 AS {column}" for column in columns if column != "id")
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"CREATE VIEW {table} AS {ENDLESS_VIEWS[name].format(values)}")
    recipe, selection = tmp_path / "all.toml", tmp_path / "a.parquet"
    recipe.write_text("[selection]\n")
    commands = [["inspect", path], ["caption", "--post", 3, "--db", path]]
    commands += [["select", recipe, "--db", path, "--out", selection]] if table == "post" else []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "kohaku_wrap", *map(str, command)],
            env={**os.environ, "KWRAP_VIEW_SECONDS": "0.5"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        if command[0] == "caption" and name.startswith("post"):
            # One post of an endless view may be found, or the search for it never ends.
            assert done.returncode in (0, 1) and "Traceback" not in done.stderr
            continue
        assert done.returncode == 1 and "gave no end within 0.5 s" in done.stderr, (command, done)
    assert not selection.exists()


def test_an_endless_view_of_posts_with_their_tags_ends_too(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        connection.execute(f"CREATE VIEW posts AS {ENDLESS} x AS id, 'solo' AS tag_string, '{{}}' AS rating FROM n")
    done = subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", "inspect", str(tmp_path / "a.db")],
        env={**os.environ, "KWRAP_VIEW_SECONDS": "0.5"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "gave no end within 0.5 s" in done.stderr, done
