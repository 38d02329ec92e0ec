"""The pictures of a run: of which networks they are drawn, where they lie, and which are not drawn yet."""

from __future__ import annotations

import math
import re
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.run_files import PROMPTS_FILE
from kohaku_wrap.config.samples import KWRAP
from kohaku_wrap.files import read_json
from kohaku_wrap.training.records.folder import STATE_NAME, Run, name_of_step
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.networks import shorter_end, step_of_network

CONTACT_SHEET = "contact-sheet.png"
"""Written last: where it is, all pictures are."""

CONTACT_SHEETS = re.compile(r"contact-sheet(?:-[0-9]+)?\.png")
"""It, and the further ones of many rows or columns."""

SHEET_RECORD = "sheet.json"
"""Beside the pictures, before the first: where the files lie that draw them, and each picture's place on the sheet."""

ASKED_FOLDER = "asked"
"""Of a run's samples, where `kwrap sample --run RUN` draws unless it is told where."""

TRAINER_FOLDER = "sample"
"""Of a run's checkpoints, where sd-scripts puts what it draws."""

TRAINER_PICTURE = re.compile(r".*?(?P<epoch>e)?(?P<number>[0-9]{6,})_(?P<prompt>[0-9]{2,})_[0-9]{14}(?:_[0-9]+)?")
"""How sd-scripts names what it draws: step, or `e` and epoch, then the prompt's place and the time."""

PROMPT_SIZE = re.compile(r" --w ([0-9]+) --h ([0-9]+) --s ([0-9]+)")
"""In a prompt for sd-scripts: width, height and steps of the sampler."""


@dataclass(frozen=True)
class Pictures:
    """Those of one network."""

    optimizer_step: int
    """At which it was saved."""

    network: Path
    """The file."""

    folder: Path
    """Where its pictures lie, or will."""

    @property
    def sheet(self) -> Path:
        """All of them on one picture."""
        return self.folder / CONTACT_SHEET

    @property
    def are_drawn(self) -> bool:
        """Whether all are there."""
        return self.sheet.is_file()


def name_contact_sheet(number: int) -> str:
    """The file of the first contact sheet, or of a further one."""
    return CONTACT_SHEET if number == 1 else f"contact-sheet-{number}.png"


def folder_of_pictures(run: Run, optimizer_step: int) -> Path:
    """Where the pictures of a step lie, for `kwrap report` too."""
    return run.samples / name_of_step(optimizer_step)


def list_pictures(run: Run) -> list[Pictures]:
    """The pictures of each network on the disk that `[samples]` asks kwrap to draw, by optimizer step."""
    asked = run.lock.table("samples")
    if asked.get("by") != KWRAP:
        return []
    every, end = int(asked.get("every") or 1), shorter_end(run) or run.lock.total_optimizer_steps
    found: dict[int, Path] = {}
    for path in run.network_files:
        step = step_of_network(run, path, end)
        if step is not None and path.suffix == ".safetensors" and (step % every == 0 or step == end):
            found[step] = path
    return [Pictures(step, path, folder_of_pictures(run, step)) for step, path in sorted(found.items())]


def read_sheet_record(folder: Path) -> dict[str, Any]:
    """What `record_sheet` wrote into a folder; empty where nothing did."""
    document = read_json(folder / SHEET_RECORD)
    tables = ("files", "tokenizers", "pictures")
    return document if all(isinstance(document.get(name), dict) for name in tables) else {}


def step_of_trainer_picture(run: Run, path: Path) -> int | None:
    """The optimizer step after which sd-scripts drew a picture; None where it has another name than it gives."""
    if not (found := TRAINER_PICTURE.fullmatch(path.stem)):
        return None
    return int(found["number"]) * (run.lock.count.optimizer_steps_per_epoch if found["epoch"] else 1)


def collect_trainer_pictures(run: Run) -> None:
    """Move what sd-scripts has drawn to the folder of its step, as it is.

    Another process may do the same now, or still write one of the files: a rename hinders neither. Raises OSError.
    """
    folder = run.checkpoints / TRAINER_FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        step = step_of_trainer_picture(run, path)
        if step is None:
            continue
        target = folder_of_pictures(run, step)
        target.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.rename(target / path.name)


def read_drawing_seconds(run: Run) -> float | None:
    """The seconds that pictures of a run took, for one pixel and one step of the sampler; None where none are there.

    The start of the process that draws and the loading of its model are part of it, as they are each time.
    """
    asked = run.lock.table("samples")
    sizes = [[asked.get(name) or 0 for name in ("width", "height", "steps")]] if asked.get("by") == KWRAP else [
        [int(each) for each in found] for found in PROMPT_SIZE.findall(run.lock.files.get(PROMPTS_FILE, ""))
    ]  # fmt: skip
    pixel_steps = statistics.mean([math.prod(each) for each in sizes] or [0])
    folders = [path for path in sorted(run.samples.glob("*")) if STATE_NAME.fullmatch(path.name)]
    counts = {path: sum(not CONTACT_SHEETS.fullmatch(each.name) for each in path.glob("*.png")) for path in folders}
    if not pixel_steps or not any(counts.values()):
        return None
    if asked.get("by") == KWRAP:
        spans = []
        for path, count in counts.items():
            with suppress(OSError, ZeroDivisionError):
                begun, ended = ((path / name).stat().st_mtime for name in (SHEET_RECORD, CONTACT_SHEET))
                spans.append((ended - begun) / count)
        return statistics.median(spans) / pixel_steps if spans and statistics.median(spans) > 0 else None
    took = sum(float(line.get("sampling_seconds") or 0.0) for line in read_metrics(run))
    return took / sum(counts.values()) / pixel_steps or None
