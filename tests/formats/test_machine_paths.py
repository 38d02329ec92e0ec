"""Paths of a machine go from metadata, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kohaku_wrap.formats.machine_paths import clean_text, clean_value, without_paths


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/home/ann/runs/a/preset.toml", "preset.toml"),
        ("/home/ann lee/my models/base 1.safetensors", "base 1.safetensors"),
        ("/home/ann", "~"), ("/root", "~"), ("/Users/ann/", "~"), ("~/models/x.bin", "x.bin"), ("~ann/x", "x"),
        ("file:///mnt/disk/x.toml", "x.toml"), ("/mnt/disk/folder/", "folder"),
        ("C:\\Users\\ann\\x.toml", "x.toml"), ("D:/work/ann/x.toml", "x.toml"), ("\\\\host\\share\\x", "x"),
        ("preset=/data/x/preset.toml", "preset=preset.toml"),
        ("a=/home/ann/b, c='/home/ann/d'", "a=b, c='d'"), ("in /home/ann, said", "in ~, said"),
        ('{"preset": "/home/ann/p.toml", "n": [1, "/tmp/x/y"]}', '{"preset": "p.toml", "n": [1, "y"]}'),
        ('{"/home/ann/images": {"n": 1}}', '{"images": {"n": 1}}'),
    ],
)  # fmt: skip
def test_paths_become_their_last_part(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned
    assert clean_text(cleaned) == cleaned
    assert clean_value([{"a": text}]) == [{"a": cleaned}]


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "1girl, :/, \\||/, <|>_<|>", "/v/", "/a/tan", "and/or", "1/2 + 3/4", "https://example.org/home/ann/x",
        "stable-diffusion-xl-v1-base/lora", "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQ/home", "base + 0.5 * (a - b)",
        '{"a": "https://x.org/y", "b": {"1": {":/": 2}}}', '{"broken', "[1, 2]", "d:/", "2e-05", "../x/y", "x/root/y",
    ],
)  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    assert clean_text(text) == text


def test_this_machines_paths_are_known(tmp_path: Path) -> None:
    inside = tmp_path / "a b" / "c.toml"
    metadata = {"x": str(inside), "y": json.dumps({"z": [str(inside)]}), "w": f"k={tmp_path}/c.toml;{tmp_path}"}
    cleaned = without_paths(metadata)
    assert cleaned["x"] == "c.toml" and json.loads(cleaned["y"]) == {"z": ["c.toml"]}
    assert str(tmp_path.parent) not in cleaned["w"]
