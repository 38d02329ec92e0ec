"""The embedded world is whole or absent, the same bytes each time, and holds every odd kind of post."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import tomllib
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli.demo import command
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.demo.posts import choose_ids
from kohaku_wrap.demo.world import WorldInTheWay, make_world

STILL = {"jpg", "png", "webp"}


def hash_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def query(world, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(world.folder / "danbooru.db")) as database:
        return database.execute(sql).fetchall()


def read_members(world) -> dict[str, tuple[Path, bytes]]:
    members = {}
    for path in sorted((world.folder / "tars" / "original").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                members[member.name] = (path, stream.read())
    return members


def test_same_posts_and_seed_make_the_same_bytes(tmp_path):
    make_world(tmp_path / "a", posts=30, seed=5)
    make_world(tmp_path / "b" / "c", posts=30, seed=5)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b" / "c")
    make_world(tmp_path / "d", posts=30, seed=6)
    first, other = hash_files(tmp_path / "a"), hash_files(tmp_path / "d")
    assert first["danbooru.db"] != other["danbooru.db"]
    assert first["base/model.safetensors"] != other["base/model.safetensors"]


def test_database_is_layout_v3_with_every_kind_of_post(world):
    tables = {name for (name,) in query(world, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {"post", "tag", "posttagrelation", "localpost"} <= tables
    assert "updated_at" in {row[1] for row in query(world, "PRAGMA table_info(post)")}
    assert query(world, "SELECT count(*) FROM post") == [(240,)]
    assert query(world, "SELECT DISTINCT rating FROM post ORDER BY 1") == [(0,), (1,), (2,), (3,)]
    assert query(world, "SELECT DISTINCT type FROM tag ORDER BY 1") == [(0,), (1,), (2,), (3,), (4,)]
    years = {year for (year,) in query(world, "SELECT DISTINCT substr(created_at, 1, 4) FROM post")}
    assert {"", "2004", "2014", "2025"} <= years
    extensions = {ext for (ext,) in query(world, "SELECT DISTINCT file_ext FROM post")}
    assert extensions >= {*STILL, "gif", "mp4", "zip", "swf"}
    for condition in ("is_deleted = 1", "is_banned = 1", "md5 IS NULL AND file_url IS NULL", "parent_id IS NOT NULL"):
        assert query(world, f"SELECT count(*) > 0 FROM post WHERE {condition}") == [(1,)], condition
    for first, last in ((0, 1999), (2000, 4999), (5000, 9999)):
        assert query(world, f"SELECT count(*) FROM post WHERE id BETWEEN {first} AND {last}")[0][0] > 40
    assert query(world, "SELECT count(*) > count(DISTINCT post_id * 1000 + tag_id) FROM posttagrelation") == [(1,)]
    untagged = "SELECT count(*) FROM post WHERE id NOT IN (SELECT post_id FROM posttagrelation)"
    assert query(world, untagged) == [(1,)]
    assert {r"\||/", ":|", "<|>_<|>"} <= {name for (name,) in query(world, "SELECT name FROM tag")}


def test_tars_hold_every_public_picture(world):
    members = read_members(world)
    assert len(members) == world.images
    rows = query(world, "SELECT id, file_ext, image_width, image_height, file_size, md5 FROM post")
    sizes = []
    for post_id, ext, width, height, size_bytes, md5 in rows:
        name = f"{post_id}.{ext}"
        if md5 is None or ext in ("mp4", "swf"):
            assert name not in members
            continue
        path, content = members[name]
        assert path.name == f"data-{post_id % 1000:04}.tar"
        assert len(content) == size_bytes
        if ext in STILL:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                assert str(image.format).lower().replace("jpeg", "jpg") == ext
                assert (width, height) in ((image.width, image.height), (2 * image.width, 2 * image.height))
                sizes.append(image.size)
    widths, heights = zip(*sizes, strict=True)
    buckets = assign_buckets(widths, heights, BucketOptions((128, 128), True, 64, 256, 32))
    assert len(buckets.resolutions) >= 3


def test_indexes_point_at_the_members(world):
    indexes = sorted((world.folder / "tars").rglob("*.json"))
    assert 0 < len(indexes) < world.tars
    for index in indexes:
        described = json.loads(index.read_text())
        content = index.with_suffix(".tar").read_bytes()
        assert described["filesize"] == len(content)
        for name, place in described["files"].items():
            data = content[place["offset"] : place["offset"] + place["size"]]
            assert hashlib.sha256(data).hexdigest() == place["sha256"], name


def test_site_names_what_was_made(world):
    site = tomllib.loads((world.folder / "site.toml").read_text())
    assert site["machine"] == {"engine": "builtin", "gpus": 0, "batch_per_gpu": 4, "workers": 2}
    for name in ("db", "tars", "base_model", "tokenizers"):
        assert (world.folder / site["paths"][name]).exists(), name


@pytest.mark.parametrize("posts", [1, 20, 240, 6999, 7000, 9000])
def test_ids_are_distinct_and_as_many_as_asked(posts):
    ids = choose_ids(posts, seed=3)
    assert len(ids) == len(set(ids)) == posts
    assert ids == sorted(ids) and ids[0] > 0


def test_a_whole_world_is_kept(tmp_path):
    folder = tmp_path / "world"
    made = make_world(folder, posts=20)
    (folder / "site.toml").write_text("# mine\n")
    again = make_world(folder, posts=20)
    assert again.kept and not made.kept
    assert (again.images, again.size_bytes) == (made.images, made.size_bytes)
    assert (folder / "site.toml").read_text() == "# mine\n"


def test_another_world_or_other_files_are_never_overwritten(tmp_path):
    folder = tmp_path / "world"
    make_world(folder, posts=20)
    with pytest.raises(WorldInTheWay, match="a world of 20 posts and seed 0"):
        make_world(folder, posts=21)
    (folder / "danbooru.db").write_bytes(b"short")
    with pytest.raises(WorldInTheWay, match=r"danbooru\.db is gone or was changed"):
        make_world(folder, posts=20)
    mine = tmp_path / "mine"
    (mine / "tars").mkdir(parents=True)
    with pytest.raises(WorldInTheWay, match="holds tars already"):
        make_world(mine, posts=20)
    assert list(mine.iterdir()) == [mine / "tars"]


def test_a_folder_with_other_files_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    make_world(tmp_path, posts=20)
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt", "danbooru.db", "tars", "base", "site.toml", "demo.json",
    }  # fmt: skip


def test_an_interrupt_leaves_nothing(tmp_path):
    folder = tmp_path / "world"
    child = subprocess.Popen(
        [sys.executable, "-m", "kohaku_wrap", "demo", str(folder), "--posts", "3000"], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 30
    while not (folder / ".demo.part").exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert not folder.exists()


def test_of_two_at_once_one_makes_the_world(tmp_path):
    argv = [sys.executable, "-m", "kohaku_wrap", "demo", str(tmp_path / "world"), "--posts", "20"]
    children = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [child.communicate(timeout=120)[1] for child in children]
    codes = sorted(child.returncode for child in children)
    assert codes in ([0, 0], [0, 2]) and not any("Traceback" in text for text in told), told
    assert make_world(tmp_path / "world", posts=20).kept


def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path):
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    done = subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", "demo", str(tmp_path / "world"), "--posts", "20"],
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"error: {tmp_path / 'world'}" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "world").exists()


def test_command_prints_one_document(tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path / "world"), "--posts", "20", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["posts"] == 20 and document["kept"] is False
    assert Path(document["site"]).is_file()


def test_the_light_packages_are_enough(tmp_path):
    program = (
        "import sys; from pathlib import Path; from kohaku_wrap.demo.world import make_world;"
        "make_world(Path(sys.argv[1]), posts=20);"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "world")], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]", done.stderr
