"""The hakubooru style equals HakuBooru 0.0.3, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kohaku_wrap.dataset.captions.making import make_captions
from kohaku_wrap.dataset.captions.plan import plan_captions
from kohaku_wrap.dataset.captions.quality import find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.dataset.selection_file import read_selected_posts
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.tags import read_tags

GOLDEN = Path(__file__).parent / "golden" / "hakubooru.json"
POSTS, LATE_POSTS = 2000, 20

CAPTION_ALL = """
import json, sys
from hakubooru.caption import KohakuCaptioner
from hakubooru.dataset import Post, load_db
load_db(sys.argv[1])
captioner = KohakuCaptioner()
with open(sys.argv[2], "w") as stream:
    json.dump({post.id: captioner.caption(post, b"") for post in Post.select().order_by(Post.id)}, stream)
"""


def caption_all(path: Path, selection: Path) -> dict[str, str]:
    """The hakubooru style of every post of a database."""
    database = open_database(path)
    select_posts(database, read_dataset({}, "all"), selection)
    posts = read_selected_posts(selection, "dateutil")
    tags = read_tags(database)
    plan = plan_captions(CaptionRecipe(style="hakubooru"), tags)
    cutoffs = find_cutoffs(plan.recipe.quality, database, posts)
    captions: list[str] = []
    for made, _ in map_tag_chunks(
        database, tags, posts.ids, lambda chunk: make_captions(plan, chunk, posts, cutoffs), 1, None
    ):
        captions += made.to_pylist()
    return dict(zip(map(str, posts.ids.tolist()), captions, strict=True))


def make_world(writer: ModuleType, posts: int) -> object:
    """Posts of every kind, some of them beyond the last id that gets a quality word."""
    world = writer.make_world(posts)
    late = writer.make_world(LATE_POSTS, seed=1, id_step=1)
    for post in late.posts:
        world.posts.append(post | {"id": post["id"] + 7_099_990})
    world.relations += [(post + 7_099_990, tag) for post, tag in late.relations]
    return world


@pytest.fixture(scope="session")
def hakubooru(request: pytest.FixtureRequest) -> Path:
    """A folder with HakuBooru 0.0.3 in it, kept between runs; the test is skipped where pip cannot get it."""
    assert request.config.cache
    folder = Path(request.config.cache.mkdir("hakubooru-0.0.3"))
    if not (folder / "hakubooru").is_dir():
        packages = ["hakubooru==0.0.3", "peewee", "python-dateutil", "six"]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(folder), *packages], capture_output=True, timeout=240, check=False)
        if done.returncode:
            pytest.skip("hakubooru==0.0.3 cannot be installed here; the golden captions were compared")
    return folder


def test_golden_captions(tmp_path: Path, writer: ModuleType) -> None:
    """`hakubooru.json` was written by HakuBooru 0.0.3 from the same made-up posts."""
    path = writer.write_layout(tmp_path / "a.db", make_world(writer, 100))
    assert caption_all(path, tmp_path / "all.parquet") == json.loads(GOLDEN.read_text("utf-8"))


@pytest.mark.slow
def test_equal_to_hakubooru_in_every_layout(tmp_path: Path, writer: ModuleType, hakubooru: Path) -> None:
    world = make_world(writer, POSTS)
    path = writer.write_layout(tmp_path / "v3.db", world)
    environment = {**os.environ, "PYTHONPATH": str(hakubooru)}
    out = tmp_path / "captions.json"
    subprocess.run([sys.executable, "-c", CAPTION_ALL, str(path), str(out)], env=environment, check=True)
    expected = json.loads(out.read_text("utf-8"))
    assert len(expected) == POSTS + LATE_POSTS
    for layout in writer.LAYOUTS:
        other = writer.write_layout(tmp_path / f"{layout}-plain.db", world, layout, indexed=False)
        assert caption_all(other, tmp_path / "all.parquet") == expected
