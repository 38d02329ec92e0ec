"""The pictures that were drawn of a run: which prompt at which step, inside the page where they are small enough."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kohaku_wrap.training.records.folder import STATE_NAME, Run
from kohaku_wrap.training.records.samples import (
    ASKED_FOLDER,
    CONTACT_SHEET,
    CONTACT_SHEETS,
    TRAINER_FOLDER,
    TRAINER_PICTURE,
    read_sheet_record,
    step_of_trainer_picture,
)
from kohaku_wrap.wording import by_numbers

INLINE_BYTES = 6_000_000
"""Pictures of more bytes than this in all stay beside the page."""

ROW_AXES = ("prompt", "style", "seed", "size", "guidance")
"""What tells pictures of one step apart, as `kwrap sample` labels them."""

ENDINGS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


@dataclass(frozen=True)
class Picture:
    """One picture."""

    row: str
    """What was asked for: the prompt, and what else tells it apart from others of its step."""

    step: int
    """Optimizer steps done of the network that drew it."""

    path: Path
    """The file."""


@dataclass(frozen=True)
class Gallery:
    """All pictures of a run."""

    steps: tuple[int, ...]
    """Optimizer steps of which there are pictures, ascending."""

    rows: tuple[tuple[str, dict[int, str]], ...]
    """What was asked for, and the picture's address by step."""

    sheets: tuple[tuple[int, str], ...]
    """Contact sheets: step and address."""

    inside: bool
    """Whether the pictures are inside the page."""

    left_out: int = 0
    """Pictures that are neither inside nor beside it."""

    def document(self) -> dict[str, Any]:
        """For the page's script."""
        return {"steps": self.steps, "rows": [{"label": label, "cells": cells} for label, cells in self.rows]}


def list_pictures(run: Run) -> Iterator[Picture]:
    """What `kwrap sample` and sd-scripts drew, in `samples/`; of kwrap 0.1 also in `checkpoints/sample/`."""
    prompts = read_prompts(run)
    asked = run.samples / ASKED_FOLDER
    told = read_sheet_record(asked).get("pictures", {})
    for path in list_files(asked):
        labels = told.get(path.name)
        if isinstance(labels, dict) and isinstance(step := labels.get("optimizer_step"), int):
            yield Picture(name_row(path, labels, prompts), step, path)
    for folder in sorted(run.samples.glob("*")):
        if not (found := STATE_NAME.fullmatch(folder.name)):
            continue
        labels = read_sheet_record(folder).get("pictures", {})
        for path in list_files(folder):
            if not CONTACT_SHEETS.fullmatch(path.name):
                yield Picture(name_row(path, labels.get(path.name), prompts), int(found[1]), path)
    for path in list_files(run.checkpoints / TRAINER_FOLDER):
        if (step := step_of_trainer_picture(run, path)) is not None:
            yield Picture(name_row(path, None, prompts), step, path)


def list_files(folder: Path) -> list[Path]:
    """The whole pictures of a folder by name; hidden ones are being written."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(each.name for each in entries if not each.name.startswith("."))
    return [folder / name for name in names if Path(name).suffix.lower() in ENDINGS]


def name_row(path: Path, labels: Any, prompts: list[str]) -> str:
    """The labels of a picture as its row; the prompt of one that sd-scripts drew; its own name where none is known."""
    if not isinstance(labels, dict):
        found = TRAINER_PICTURE.fullmatch(path.stem)
        place = int(found["prompt"]) if found else 0
        row = f"{place + 1}: {prompts[place]}" if place < len(prompts) else f"prompt {place + 1}"
        return row if found else path.stem
    parts = [str(labels[axis]) for axis in ROW_AXES if labels.get(axis) not in (None, "", "none")]
    return ", ".join(parts) or path.stem


def read_prompts(run: Run) -> list[str]:
    """The prompts that the run gave to sd-scripts, without their options."""
    lines = run.lock.files.get("sample_prompts.txt", "").splitlines()
    return [re.split(r"\s--\w", line)[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def make_gallery(run: Run, page_folder: Path | None) -> Gallery:
    """The pictures as the page has them; `page_folder`: where it will lie, None for a page without others beside it."""
    pictures = [(each, size) for each in list_pictures(run) if (size := size_of(each.path))]
    inside = sum(size for _, size in pictures) <= INLINE_BYTES
    rows: dict[str, dict[int, str]] = {}
    if inside or page_folder is not None:
        for each, _ in pictures:
            address = embed(each.path) if inside else refer(each.path, page_folder or run.folder)
            # What labels do not tell, such as the sampler, makes a row; of a step trained again the newest counts.
            is_another = each.path.parent.name == ASKED_FOLDER and each.step in rows.get(each.row, {})
            rows.setdefault(f"{each.row}, {each.path.stem}" if is_another else each.row, {})[each.step] = address
    sheets = sorted(run.samples.glob(f"*/{CONTACT_SHEET}")) if page_folder else []
    return Gallery(
        steps=tuple(sorted({step for cells in rows.values() for step in cells})),
        rows=tuple(sorted(rows.items(), key=lambda row: by_numbers(row[0]))),
        sheets=tuple(
            (int(found[1]), refer(path, page_folder or run.folder))
            for path in sheets
            if (found := STATE_NAME.fullmatch(path.parent.name))
        ),
        inside=inside,
        left_out=0 if rows else len(pictures),
    )


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where it is gone or none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def embed(path: Path) -> str:
    """The picture as an address that holds it; empty where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    return f"data:{ENDINGS[path.suffix.lower()]};base64,{base64.b64encode(data).decode()}"


def refer(path: Path, page_folder: Path) -> str:
    """The picture's address from the page's folder; a page and its pictures can be moved together."""
    relative = os.path.relpath(path, page_folder)
    return quote(os.fsencode(relative if relative.startswith("..") else f"./{relative}"))
