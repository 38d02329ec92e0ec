"""Small judges, and the embedded world with a model to draw with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kohaku_wrap.cli import run_program
from kohaku_wrap.demo.world import make_world
from kohaku_wrap.evaluation.judge_folders import open_judge
from kohaku_wrap.evaluation.small_judges import build_small_judges

INDEXED = ("alice_(garden)", "bob", "carol", "dora")


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small judge of each kind, in a folder of its name."""
    folder = tmp_path_factory.mktemp("judges")
    build_small_judges(folder, ("1girl", "smile", "long_hair"))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "world"
    make_world(folder, posts=60)
    return folder


@pytest.fixture(scope="session")
def extracted(world: Path) -> Path:
    """The same world with its images and captions."""
    db, selection, images = world / "danbooru.db", world / "demo.parquet", world / "images"
    for words in (
        ["select", "demo", "--db", db, "--out", selection],
        ["extract", selection, "--tars", world / "tars", "--out", images, "--jobs", 1, "--max-missing", 9],
        ["caption", selection, "--db", db, "--out", images],
    ):
        assert run_program([str(word) for word in words]) == 0
    return world


@pytest.fixture(scope="session")
def index(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index in the published layout: features of noise of one colour a character; the last one has none."""
    folder, judge = tmp_path_factory.mktemp("index"), open_judge(judges / "ccip")
    entries = []
    for number, tag in enumerate(INDEXED):
        short = tag.replace("_(", "_").rstrip(")")
        entries.append({"tag": tag, "short_tag": short, "hprefix": f"a{number}", "post_count": 100 + number,
                        "core_tags": {"long_hair": 0.9}, "copyright": ["garden"], "gender": "girl"})  # fmt: skip
        if number == len(INDEXED) - 1:
            continue
        rows = []
        for seed in range(6):
            draw = np.random.default_rng(10 * number + seed)
            pixels = np.clip(draw.normal([60 * number, 200 - 60 * number, 128], 40, (32, 48, 3)), 0, 255)
            path = folder / "picture.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            rows.append(judge.look_at(path))
            path.unlink()
        (folder / f"a{number}" / short).mkdir(parents=True)
        np.save(folder / f"a{number}" / short / "feat.npy", np.stack(rows))
    (folder / "characters.json").write_text(json.dumps(entries))
    return folder
