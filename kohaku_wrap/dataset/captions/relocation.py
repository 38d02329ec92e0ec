"""Caption files of an image folder that was moved, led to where it lies now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.dataset.captions.formats import CACHE_FILE, LINES_FILE
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.files import atomic_write, parse_json
from kohaku_wrap.formats.caption_rows import read_subsets


class NotRelocatable(KwrapError):
    """There is no caption file, or it is not one that `kwrap caption` wrote."""


@dataclass(frozen=True)
class RelocationReport:
    """What was rewritten."""

    folder: Path
    """Where the images lie now."""

    files: dict[str, int]
    """Entries by file."""

    missing: int
    """Entries of the cache whose image is not in the folder; they were left out."""


def relocate_captions(folder: Path) -> RelocationReport:
    """Rewrite the absolute paths of metadata_cache.json and captions.jsonl to `folder`. Raises NotRelocatable."""
    folder = folder.absolute()
    if read_subsets(folder):
        raise NotRelocatable(
            f"{folder}: images of your own, whose caption files `kwrap import` writes",
            f"Run `{command_line('import', 'FOLDER', '--out', folder)}` again: images and ids stay as they are.",
        )
    files: dict[str, int] = {}
    missing = 0
    cache, lines = folder / CACHE_FILE, folder / LINES_FILE
    if cache.is_file():
        kept = 0
        with blaming(cache), atomic_write(cache) as stream:
            for path, entry in read_cache_entries(cache):
                moved = move_path(path, folder)
                if not moved.is_file():
                    missing += 1
                    continue
                stream.write(",\n" if kept else "{\n")
                stream.write(f"{json.dumps(moved.as_posix())}: {json.dumps(entry)}")
                kept += 1
            stream.write("\n}\n" if kept else "{}\n")
        files[CACHE_FILE] = kept
    if lines.is_file():
        count = 0
        with blaming(lines), lines.open(encoding="utf-8") as source, atomic_write(lines) as stream:
            for line in source:
                entry = parse_json(line)
                entry["image_path"] = move_path(entry["image_path"], folder).as_posix()
                stream.write(json.dumps(entry) + "\n")
                count += 1
        files[LINES_FILE] = count
    if not files:
        raise NotRelocatable(
            f"{folder}: neither {CACHE_FILE} nor {LINES_FILE} is there",
            "Give the image folder with --out; `kwrap caption SEL.parquet --db DB --out IMAGES` writes captions.",
        )
    return RelocationReport(folder, files, missing)


def move_path(path: str, folder: Path) -> Path:
    """The same NNNN/ID.ext below `folder`. Raises ValueError for another path."""
    parts = path.replace("\\", "/").rsplit("/", 2)
    if len(parts) < 2 or not all(parts[-2:]) or ".." in parts[-2:]:
        raise ValueError(f"{path}: no NNNN/ID.ext")
    return folder / parts[-2] / parts[-1]


def read_cache_entries(path: Path) -> Iterator[tuple[str, object]]:
    """Path and value of each entry, line by line: the cache of millions of images is not held in memory."""
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            text = line.strip().rstrip(",")
            if (number == 0 and text == "{") or text in ("}", "{}"):
                continue
            yield from parse_json("{" + text + "}").items()


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Refuse a file in another form; what the disk says of it stays. Raises NotRelocatable."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotRelocatable(
            f"{path}: not in the form that `kwrap caption` writes",
            "Write the captions again with `kwrap caption SEL.parquet --db DB --out IMAGES`.",
        ) from error
