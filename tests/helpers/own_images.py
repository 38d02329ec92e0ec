"""Folders of one's own to import, and what an import made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.formats.caption_rows import open_captions
from kohaku_wrap.formats.caption_writer import check_columns


def paint(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0, text: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def run(*words: object, code: int = 0) -> Any:
    """The document of `kwrap import … --json`, or what is said on stderr of one that ends otherwise."""
    result = CliRunner().invoke(program, ["import", *map(str, words), "--json"])
    failure = result.exception
    if failure is not None and not isinstance(failure, SystemExit):
        assert getattr(failure, "exit_code", None) == code, failure
        return str(failure)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def rows_of(images: Path) -> dict[str, dict[str, Any]]:
    """Each row of captions.arrow by its file."""
    check_columns(images / "captions.arrow")
    return {row["file"]: row for row in open_captions(images).read_all().to_pylist()}


def captions_of(images: Path) -> dict[str, str]:
    return {Path(file).name: row["caption"] for file, row in rows_of(images).items()}


def lines(path: Path, texts: dict[str, str]) -> list[object]:
    entries = [json.dumps({"file_name": name, "text": text, "extra": 1}) for name, text in texts.items()]
    (path / "metadata.jsonl").write_text("\n".join(entries) + "\n\n")
    return []
