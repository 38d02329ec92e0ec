"""A folder of images with captions beside them, and a place to import them into."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_images import paint


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for seed, name in enumerate(("a.png", "sub dir/b.jpg", "sub dir/ünter/c.webp", "猫/d.bmp", "E.PNG")):
        paint(folder / name, seed=seed, text=f"{name}, ☂ smile")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "images"
