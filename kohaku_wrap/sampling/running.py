"""A sheet drawn by one process or several, each of which takes cells that are not drawn and that no other one has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import Progress, write_text
from kohaku_wrap.locks import clear_leavings
from kohaku_wrap.merging.hashes import FileHashes
from kohaku_wrap.processes import ask_in_lines
from kohaku_wrap.sampling.checkpoints import files_of
from kohaku_wrap.sampling.expanding import KnownModel, PlacedCell
from kohaku_wrap.sampling.pictures import VAE, is_drawn
from kohaku_wrap.training.records.samples import SHEET_RECORD, read_sheet_record

WORKER = "kohaku_wrap.sampling.drawing.worker"
DRAWING_SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_WAIT_POLICY": "PASSIVE"}
"""Variables of a process that draws; threads that wait in a loop take the processor from the other processes."""


class DrawingFailed(KwrapError):
    """A process that draws ended, and did not say why."""


class TooLittleMemory(KwrapError):
    """Cells that no process has the memory for; all others are drawn."""


@dataclass(frozen=True)
class DrawingJob:
    """What is drawn, and by whom."""

    cells: Sequence[PlacedCell]
    """All of the sheet."""

    models: Sequence[KnownModel]
    """Those that its cells are drawn with."""

    hashes: Mapping[Path, FileHashes]
    """Of the models' files."""

    tokenizers: tuple[Path, Path]
    """Both folders."""

    out: Path
    """Where the pictures go."""

    processes: int = 1
    """How many draw at once."""

    offload: bool = False
    """Whether parts of the model are on the device only while they are used."""

    def compose(self, cells: Sequence[PlacedCell], index: int) -> dict[str, Any]:
        """The job of one process as JSON."""
        places = {known.model: number for number, known in enumerate(self.models)}
        return {
            "out": str(self.out),
            "index": index,
            "offload": self.offload,
            "tokenizers": [str(folder) for folder in self.tokenizers],
            "models": [self.describe(known) for known in self.models],
            "cells": [[places[each.model], each.cell.describe()] for each in cells],
        }

    def describe(self, known: KnownModel) -> dict[str, Any]:
        """One model as JSON."""
        model = known.model
        weights = [("", ""), *(("", each.weight) for each in model.networks), (VAE, "")]
        return {
            **model.describe(),
            "files": [
                {"name": path.name, "sha256": self.hashes[path].sha256, "data_sha256": self.hashes[path].data_sha256,
                 "weight": weight, "part": part}
                for path, (part, weight) in zip(files_of(model), weights, strict=False)
            ],
            "optimizer_step": model.optimizer_step,
            "prediction_from": known.prediction.source,
        }  # fmt: skip


def find_waiting(job: DrawingJob) -> list[PlacedCell]:
    """The cells whose whole picture is not there yet."""
    return [each for each in job.cells if not is_drawn(job.out / each.cell.name, each.cell)]


def draw_sheet(job: DrawingJob, waiting: Sequence[PlacedCell], on_progress: Progress) -> None:
    """Draw the cells that wait; `on_progress` is told cells.

    Raises what ended a process: KwrapError, OSError; the other processes are stopped then. Raises TooLittleMemory when
    all other cells are drawn.
    """
    record_sheet(job)
    if not waiting:
        return
    jobs = [job.compose(waiting, index) for index in range(min(job.processes, len(waiting)))]
    drawn: set[str] = set()
    too_large: dict[str, str] = {}
    on_progress(0, len(waiting))
    failed = DrawingFailed, "a process that draws failed", "What was drawn is kept; run it again to go on."
    with closing(ask_in_lines(WORKER, jobs, DRAWING_SETTINGS, *failed)) as answers:
        for answer in answers:
            too_large |= dict.fromkeys(answer.get("too_large", ()), answer.get("what", ""))
            drawn |= {answer["drawn"]} if "drawn" in answer else set()
            on_progress(len(drawn), len(waiting))
    clear_leavings(job.out, f".{SHEET_RECORD}.*.part", ".contact-sheet*.part")
    if missing := [each.cell.name for each in find_waiting(job) if each.cell.name in too_large]:
        more = f" (and for {len(missing) - 1:,} more of the sheet)" if missing[1:] else ""
        raise TooLittleMemory(
            f"{missing[0]}: {too_large[missing[0]]}{more}",
            "Draw with a smaller --batch, --offload, --dtype fp16 or a smaller size; all that fits is drawn and kept.",
        )


def record_sheet(job: DrawingJob) -> None:
    """Write where the files lie, and each picture's place; what an earlier sheet of the folder wrote is kept."""
    path = job.out / SHEET_RECORD
    held = read_sheet_record(job.out)
    files = {**held.get("files", {}), **{hashes.sha256: str(file.absolute()) for file, hashes in job.hashes.items()}}
    digest = job.cells[0].cell.tokenizers
    tokenizers = {**held.get("tokenizers", {}), digest: [str(folder.absolute()) for folder in job.tokenizers]}
    placed = {each.cell.name: {**each.labels, "optimizer_step": each.model.optimizer_step} for each in job.cells}
    pictures = {**held.get("pictures", {}), **placed}
    document = {"format": 1, "files": files, "tokenizers": tokenizers, "pictures": pictures}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    job.out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
